"""Optimisers that pass over the weights once a step: the same steps, and only where that is safe."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from compressor.training.loop import train
from compressor.training.optim import make_optimizer, use_fused_kernels


def flags(*groups: list[nn.Parameter], opt: str = "adamw", settings: dict[str, Any] | None = None) -> list[Any]:
    """Returns what the groups of an optimiser say of it."""
    optimizer, _ = make_optimizer([{"params": group} for group in groups], opt, 0.1, "cosine", 1, 2)
    for group in optimizer.param_groups:
        group.update(settings or {})
    use_fused_kernels(optimizer)
    return [group.get("fused") for group in optimizer.param_groups]


def parameters(*shape: int, **kind: Any) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(*shape, **kind))]


@pytest.mark.parametrize("opt", ["adam", "adamw"])
def test_adam_and_adamw_do(opt: str) -> None:
    assert flags(parameters(2), parameters(3), opt=opt) == [True, True]


@pytest.mark.parametrize("opt", ["sgd", "momentum", "nesterov", "adagrad", "lamb", "lookahead_adamw"])
def test_others_do_not(opt: str) -> None:
    """SGD would stop at a parameter whose first gradient comes later; see the next test."""
    assert flags(parameters(2), opt=opt) == [None]


def test_what_lies_otherwise_in_memory_does_not() -> None:
    last = nn.Parameter(torch.zeros(1, 2, 3, 3).to(memory_format=torch.channels_last))
    sliced = nn.Parameter(torch.zeros(4)[::2])
    meta = parameters(2, device="meta")
    assert flags([last], [sliced], meta, parameters(1), parameters(2, dtype=torch.complex64)) == [
        None, None, None, True, None,
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["foreach", "capturable", "differentiable"])
def test_settings_against_it_hold(name: str) -> None:
    assert flags(parameters(2), settings={name: True}) == [None]


def test_what_a_checkpoint_says_of_it_does_not_hold() -> None:
    """A training may go on with weights that lie otherwise, or from a checkpoint of before."""
    last = nn.Parameter(torch.zeros(1, 2, 3, 3).to(memory_format=torch.channels_last))
    assert flags([last], parameters(2), settings={"fused": True}) == [None, True]
    assert flags([last], parameters(2), settings={"fused": None}) == [None, True]


class LateBranch(nn.Module):
    """A layer that has no gradient in the first steps."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.first, self.late = 0, nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        both: torch.Tensor = self.first(inputs)
        return both + self.late(inputs) if self.calls > 2 else both


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_training_steps_as_it_did(opt: str) -> None:
    """The same weights as in PyTorch's own way, to within rounding, also where a gradient comes late."""
    torch.manual_seed(0)
    images = torch.randn(24, 3)
    data = DataLoader(TensorDataset(images, (images[:, 0] > 0).long()), 4)
    trained = []
    for own_way in (True, False):
        torch.manual_seed(1)
        model = LateBranch()
        optimizer, schedule = make_optimizer([{"params": list(model.parameters())}], opt, 0.1, "cosine", 2, len(data))
        if own_way:
            _train_by_hand(model, data, optimizer, schedule)
        else:
            train(model, data, lambda o, t, x: nn.functional.cross_entropy(o, t), optimizer, schedule, 2)
        trained.append(torch.cat([weights.detach().reshape(-1) for weights in model.parameters()]))
    torch.testing.assert_close(trained[1], trained[0])


def _train_by_hand(model: nn.Module, data: DataLoader[Any], optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    for _ in range(2):
        for images, classes in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), classes).backward()
            optimizer.step()
            schedule.step()
