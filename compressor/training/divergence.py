"""Divergence of a training: its loss, or a weight, is no longer finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

__all__ = ["DivergedError", "check_loss", "check_weights"]


class DivergedError(Exception):
    """The loss, or a weight, is no longer finite; caught within the training."""


def check_loss(loss: Tensor) -> None:
    """Checks that a loss, a scalar, is finite; a sum of losses is not finite where one of them is not.

    Raises:
        DivergedError: it is not.
    """
    value = float(loss)
    if not math.isfinite(value):
        raise DivergedError(f"the loss is {value}")


def check_weights(optimizer: Optimizer) -> None:
    """Checks that all trained weights are finite, because the gradient of a finite loss need not be.

    Raises:
        DivergedError: one of them is not.
    """
    weights = [p.detach() for group in optimizer.param_groups for p in group["params"] if p.numel()]
    if weights and not math.isfinite(get_total_norm(weights, norm_type=torch.inf)):
        raise DivergedError("weights are no longer numbers")
