"""Settling: after training, weights are rounded to shorter codes until the file has the size that was asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from compressor.lifecycle.target import AIM, NEAR
from compressor.sharing.code_length import CodeLength, lengths_of

__all__ = ["rounded_by_length", "settle"]

FIRST_WEIGHT = math.log(2) / 6 * 4  # of a bit, in squared steps: four times that by which the steps were chosen
MOST_WEIGHT = 1e7  # at which every weight has the shortest code
PASSES = 24
INTERPOLATED = 8  # of PASSES; bytes may jump from one weight to the next, so then the rest is halved
LEAST_GROWTH, MOST_GROWTH = 2.0, 16.0  # times, from one weight to the next until the target is between two
LEAST_SHARE = 0.05  # of what is between two weights, that the next one cuts off


def settle(lengths: Sequence[CodeLength], target: int, size: int, size_of: Callable[[], int]) -> int:
    """Moves master weights to codewords of shorter codes until the file is at most the target; returns its bytes.

    Weights are rounded anew by ``rounded_by_length``: as steps follow from curvature, an error of one step costs the
    same in all tensors. The least weight of a bit that does is searched for, until the file is near the target.

    Args:
        lengths: of the groups that may change.
        target: bytes of the file.
        size: bytes of the file as it is.
        size_of: returns the bytes of the file, were the model packed now.
    """
    if size <= target:
        return size
    masters = [length.master.clone() for length in lengths]
    codes = [lengths_of(length.counts()) for length in lengths]

    def size_at(weight: float) -> int:
        for length, master, code in zip(lengths, masters, codes, strict=True):
            least, step = length.grid
            length.master.copy_(rounded_by_length(master.float() / step, code, least, weight).double() * step)
        return size_of()

    low, high, weight = (0.0, size), (math.inf, 0), FIRST_WEIGHT  # weights and bytes: too large, small enough
    for passes in range(1, PASSES + 1):
        found = size_at(weight)
        if NEAR * target <= found <= target:
            return found
        low, high = (low, (weight, found)) if found <= target else ((weight, found), high)
        # Bytes fall nearly in proportion to the weight of a bit.
        if high[0] == math.inf:
            growth = (size - AIM * target) / max(size - found, 1)
            weight *= min(max(growth, LEAST_GROWTH), MOST_GROWTH)
        else:
            share = (low[1] - AIM * target) / (low[1] - high[1]) if passes < INTERPOLATED else 0.5
            weight = low[0] + min(max(share, LEAST_SHARE), 1 - LEAST_SHARE) * (high[0] - low[0])
        if weight > MOST_WEIGHT:
            break
    return size_at(min(high[0], MOST_WEIGHT))


def rounded_by_length(weights: Tensor, code: Tensor, least: int, weight: float) -> Tensor:
    """Returns the whole number q for each weight u at which ``(u - q)^2 + weight * length(q)`` is least.

    That is the q at which ``q^2 + weight * length(q) - 2 u q`` is least: a corner of the lower convex hull of the
    points (q, q^2 + weight * length(q)), between the two edges whose slopes have 2 u between them.

    Args:
        weights: float32[shape], in steps.
        code: float64[K], the length of the code of each number from ``least`` on.
        least: the first number of the grid.
        weight: of a bit.

    Example:
        >>> code = torch.tensor([9.0, 2.0, 1.0, 2.0, 9.0])
        >>> rounded_by_length(torch.tensor([0.5, 0.8, 1.9]), code, -2, 0.2).tolist()
        [0, 1, 1]
    """
    numbers = range(least, least + len(code))
    heights = [number**2 + weight * length for number, length in zip(numbers, code.tolist(), strict=True)]
    corners: list[int] = []
    slopes: list[float] = []  # of the edge before each corner but the first
    for number, height in zip(numbers, heights, strict=True):
        while corners:
            slope = (height - heights[corners[-1] - least]) / (number - corners[-1])
            if not slopes or slope > slopes[-1]:
                slopes.append(slope)
                break
            corners.pop()
            slopes.pop()
        corners.append(number)
    found = torch.bucketize(weights, torch.tensor(slopes, device=weights.device).to(weights) / 2)
    return torch.tensor(corners, dtype=torch.int32, device=weights.device)[found]
