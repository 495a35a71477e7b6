"""A small network, and the ways to wrap it, for the tests of the verbs of TensorFlow Model Optimization."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor.api.clustering import cluster_weights
from compressor.api.quantization import quantize_model


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4))


def sparse_net() -> nn.Sequential:
    model = net()
    with torch.no_grad():
        for weight in weights(model):
            weight *= torch.rand_like(weight) > 0.5
    return model


def images() -> Tensor:
    return torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, steps: int = 5) -> None:
    """Trains in a plain loop, which does not depend on how the model is wrapped."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(images()), torch.arange(8) % 4).backward()
        optimizer.step()
    model.eval()


def weights(model: nn.Module) -> list[Tensor]:
    return [module.weight.detach() for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


CLUSTERINGS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "tensor": lambda model: cluster_weights(model, 8),
    "channel": lambda model: cluster_weights(model, 8, cluster_per_channel=True),
    "sparse": lambda model: cluster_weights(model, 8, preserve_sparsity=True),
    "sparse channel": lambda model: cluster_weights(model, 8, preserve_sparsity=True, cluster_per_channel=True),
    "quantized": quantize_model,
}
