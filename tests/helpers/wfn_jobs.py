"""Two layers under weight fixing, and their training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compressor.compressor import Compressor
from compressor.policy.policy import Policy, Rule
from compressor.schemes.wfn import FRACTIONS

ROUNDS = len(FRACTIONS)


def network(scale: float = 1.0) -> Any:
    """Returns two layers, the weights of the second larger by ``scale``."""
    torch.manual_seed(0)
    net: Any = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
    with torch.no_grad():
        net[2].weight.mul_(scale)
    return net


def job_of(net: nn.Module, **settings: Any) -> Compressor:
    return Compressor(net, Policy([Rule("*", scheme="wfn", **settings)]), teacher=None).prepare()


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(16, 32), torch.randint(10, (16,))


def train(job: Compressor, optimizer: torch.optim.Optimizer, steps: int) -> None:
    inputs, targets = batch()
    for _ in range(steps):
        optimizer.zero_grad()
        job.loss(job.model(inputs), targets).backward()
        optimizer.step()


def fixed_count(job: Compressor) -> int:
    return sum(int((job.groups[0].indices(site) >= 0).sum()) for site in job.groups[0].sites)


def momentum(job: Compressor) -> torch.optim.Optimizer:
    return torch.optim.SGD(job.model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)


def zero_shares(job: Compressor) -> list[float]:
    model: Any = job.model
    return [float((layer.weight == 0).float().mean()) for layer in (model[0], model[2])]
