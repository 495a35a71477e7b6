"""A small network with norms of both kinds, and images for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["images", "network", "trained_norms"]


def trained_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives norms and biases the values that training would: all different, means far from zero."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.05, 4)
            elif name.endswith("num_batches_tracked"):
                tensor.fill_(100)
            elif tensor.ndim == 1:
                tensor.copy_(torch.randn_like(tensor) / 2 + (1.0 if name.endswith("weight") else 0.0))
    return model.eval()


def network() -> Any:
    """Returns two convolutions with BatchNorm, and a LayerNorm before a linear layer."""
    torch.manual_seed(0)
    return trained_norms(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32),
            nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(32), nn.Linear(32, 10),
        )
    )  # fmt: skip


def images(count: int = 32) -> Tensor:
    """Returns float[count, 3, 12, 12], the same at every call."""
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(1))
