"""What it means that a training has diverged: its loss, or a weight, is no longer a number."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

__all__ = ["DivergedError", "check_loss", "check_weights"]


class DivergedError(Exception):
    """The loss, or a weight, is no longer a number; caught within the training."""


def check_loss(loss: Tensor) -> None:
    """Raise DivergedError for a loss that is not finite, a scalar; a sum is not where one of its terms was not."""
    value = float(loss)
    if not math.isfinite(value):
        raise DivergedError(f"the loss is {value}")


def check_weights(optimizer: Optimizer) -> None:
    """Raise DivergedError where a weight that is trained is not finite: the gradient of a finite loss need not be."""
    weights = [p.detach() for group in optimizer.param_groups for p in group["params"] if p.numel()]
    if weights and not math.isfinite(get_total_norm(weights, norm_type=torch.inf)):
        raise DivergedError("weights are no longer numbers")
