"""A small network, its images and its calibrator, for the tests of calibration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compressor.calibration.calibrator import Calibrator
from compressor.sharing.sites import find_tensors

__all__ = ["calibrator", "images", "network"]


def network() -> Any:
    """Returns two convolutions and a linear layer, in eval mode."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 2, groups=2), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1, stride=2), nn.GELU(), nn.Flatten(),
        nn.Linear(12, 3),
    ).eval()  # fmt: skip


def images(count: int = 5, size: int = 5) -> Tensor:
    """Returns inputs of ``network``, float[count, 2, size, size]."""
    return torch.randn(count, 2, size, size, generator=torch.Generator().manual_seed(1))


def calibrator(model: nn.Module, inputs: Tensor, names: str = "weight", **options: Any) -> Calibrator:
    """Returns the calibrator of the tensors of a model whose names end so."""
    sites = [site for site in find_tensors(model) if site.name.endswith(names)]
    return Calibrator(model, sites, inputs, {site.name: site.tensor.detach() for site in sites}, **options)
