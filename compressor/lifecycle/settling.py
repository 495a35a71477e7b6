"""Settling: after training, weights are rounded to shorter or longer codes until the file has the size asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from compressor.lifecycle.target import NEAR
from compressor.ops.parallel import cache_chunks
from compressor.sharing.code_length import CodeLength, lengths_of

__all__ = ["rounded_by_length", "settle"]

FIRST_WEIGHT = math.log(2) / 6 / 16  # of a bit, in squared steps: a 16th of that by which the steps were chosen
MOST_WEIGHT = 1e7  # at which every weight is zero
PASSES = 24


def settle(lengths: Sequence[CodeLength], target: int, size: int, size_of: Callable[[], int]) -> int:
    """Moves master weights to other codewords such that the file is at most the target, and returns its bytes.

    Weights are rounded anew by ``rounded_by_length``: as steps follow from curvature, an error of one step costs the
    same in all tensors. The weight of a bit is searched for; where the file has room for more it is below zero.

    Args:
        lengths: of the groups that may change.
        target: bytes of the file.
        size: bytes of the file now.
        size_of: returns the bytes of the file, were the model packed now.
    """
    if NEAR * target <= size <= target:
        return size
    masters = [length.master.clone() for length in lengths]
    codes = [lengths_of(length.counts()) for length in lengths]
    shrinks = size > target

    def size_at(weight: float) -> int:
        for length, master, code in zip(lengths, masters, codes, strict=True):
            least, step = length.grid
            numbers = rounded_by_length(master.float() / step, code, least, weight if shrinks else -weight)
            length.master.copy_(numbers.double() * step)
        return size_of()

    low, high, weight = 0.0, math.inf, FIRST_WEIGHT
    best = MOST_WEIGHT if shrinks else 0.0
    for _ in range(PASSES):
        size = size_at(weight)
        fits = size <= target
        if fits and size >= NEAR * target:
            return size
        best = weight if fits else best
        low, high = (low, weight) if fits == shrinks else (weight, high)
        weight = 4 * weight if high == math.inf else (low + high) / 2
        if weight > MOST_WEIGHT:
            break
    return size_at(best)


def rounded_by_length(weights: Tensor, code: Tensor, least: int, weight: float) -> Tensor:
    """Returns the whole number q for each weight u at which ``(u - q)^2 + weight * length(q)`` is least.

    Compared are the nearest number of the grid, its neighbours, and zero.

    Args:
        weights: float32[shape], in steps.
        code: float64[K], the length of the code of each number from ``least`` on.
        least: the first number of the grid, at most 0.
        weight: of a bit.

    Example:
        >>> code = torch.tensor([9.0, 2.0, 1.0, 2.0, 9.0])
        >>> rounded_by_length(torch.tensor([0.6, 0.8, 1.9]), code, -2, 0.2).tolist()
        [0, 1, 1]
    """
    flat, code = weights.reshape(-1), code.to(weights)
    result = torch.empty(flat.shape, dtype=torch.int32, device=flat.device)
    for chunk in cache_chunks(flat):
        part = flat[chunk]
        nearest = part.round().clamp_(least, least + len(code) - 1)
        tried = torch.stack([nearest, nearest - 1, nearest + 1, torch.zeros_like(nearest)])
        tried.clamp_(least, least + len(code) - 1)
        costs = (part - tried).square_() + weight * code[(tried - least).long()]
        result[chunk] = tried.gather(0, costs.argmin(dim=0, keepdim=True))[0].int()
    return result.view(weights.shape)
