"""The price of a bit: the step of a grid at which one bit more costs what it saves."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["MOST_STEPS", "entropy", "grid_step", "least_step"]

MOST_STEPS = 50_000
"""Steps between the ends of a grid at most: a file may have grids of 65,536 values."""


def entropy(numbers: Tensor) -> float:
    """Returns the bits that a whole number takes in the mean, coded by how often each occurs; 0 where there is none.

    Args:
        numbers: int[n].

    Example:
        >>> entropy(torch.tensor([0, 0, 1, -3]))
        1.5
    """
    if not len(numbers):
        return 0.0
    counts = torch.bincount(numbers - numbers.min()).double()
    counts = counts[counts > 0]
    return float((counts * (counts.sum() / counts).log2()).sum() / counts.sum())


def grid_step(rate: float, curvature: float, weights: Tensor) -> float:
    """Returns the step at which one bit more a weight saves the loss that it costs.

    Rounding to a step s adds ``curvature s^2 / 24`` to the loss for each weight, and a step half as large takes one bit
    more, so the sum with ``rate`` times the bits is least where ``s^2 = 12 rate / (ln 2 curvature)``.

    Args:
        rate: the price of a bit.
        curvature: the mean over the weights.
        weights: float[shape]; the grid gets no more values than a file may list.

    Example:
        >>> round(grid_step(math.log(2) / 12, 4.0, torch.ones(1)), 12)
        0.5

    Reference: Gish, Pierce, "Asymptotically Efficient Quantizing", IEEE Transactions on Information Theory, 1968.
    """
    largest = float(weights.abs().max()) if weights.numel() else 0.0
    smallest = least_step(weights)
    step = math.sqrt(12 * rate / (math.log(2) * curvature)) if curvature > 0 else math.inf
    return float(torch.tensor(min(max(step, smallest), max(4 * largest, smallest)), dtype=torch.float32))


def least_step(weights: Tensor) -> float:
    """Returns the least step of a grid through zero that reaches all weights, float[shape], in ``MOST_STEPS`` steps.

    Example:
        >>> least_step(torch.tensor([-0.5, 0.25])) * MOST_STEPS
        1.0
    """
    largest = float(weights.abs().max()) if weights.numel() else 0.0
    return max(2 * largest / MOST_STEPS, torch.finfo(torch.float32).tiny)
