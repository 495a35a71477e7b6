"""A task that a small network learns: which of four sums of the inputs is the largest."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Linear(96, 4))


def batches(count: int = 60) -> DataLoader[Any]:
    """Returns inputs whose class is the largest of four sums of them."""
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(32, 64, generator=generator) for _ in range(count)]
    pairs = [(one, one.view(32, 4, 16).sum(dim=2).argmax(dim=1)) for one in inputs]
    return DataLoader(pairs, batch_size=None)  # type: ignore[arg-type]
