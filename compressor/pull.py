"""The pull of free weights towards their nearest codewords, by relative distance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from compressor.hashing import Hash
from compressor.indexing import blocks, on_processor
from compressor.pull_kernel import FURTHEST, LEAST, STEEPEST, TEMPERATURE, Pulled, in_machine_code

__all__ = ["pull"]


def pull(latent: Tensor, indices: Tensor, codebook: Tensor, zero_below: float) -> tuple[Tensor, int]:
    """Sum ``sum_j softmin_j(D_ij / 0.05) D_ij`` over the free weights, ``D_ij = |w_i - c_j| / |w_i|``.

    The sum over j is over the two codewords on either side of the weight, O(N): others are further, and of little
    weight (divergence: the paper takes all). The gradient is worked out in the backward pass from ``latent`` and
    ``indices``, so that nothing of their size is kept for it.

    Args:
        latent: float, any shape.
        indices: int8, int16 or int32 of that shape, below 0 where a weight is free.
        codebook: float32[K], ascending.
        zero_below: the magnitude below which the distance to the codeword 0 is 0.

    Returns:
        The sum, float64 scalar; and how many weights are free.

    Reference: Subia-Waud, Dasmahapatra, "Weight Fixing Networks", ECCV 2022, section 3.
    """
    result: tuple[Tensor, int] = _Pull.apply(latent, indices, codebook, zero_below)
    return result


class _Pull(Function):
    @staticmethod
    def forward(ctx: Any, latent: Tensor, indices: Tensor, codebook: Tensor, zero_below: float) -> tuple[Tensor, int]:
        ctx.save_for_backward(latent, indices, codebook)
        ctx.zero_below = zero_below
        total, count, _ = _pull(latent, indices, codebook, zero_below, None)
        return total, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, of_count: None) -> tuple[Tensor, None, None, None]:
        latent, indices, codebook = ctx.saved_tensors
        slope = _pull(latent, indices, codebook, ctx.zero_below, gradient)[2]
        assert slope is not None
        most = torch.finfo(latent.dtype).max
        slope = slope.clamp_(-most, most) if most < STEEPEST else slope
        return slope.view(latent.shape).to(latent.dtype), None, None, None


def _pull(latent: Tensor, indices: Tensor, codebook: Tensor, zero_below: float, gradient: Tensor | None) -> Pulled:
    """Pull, and where a ``gradient`` is given multiply the slopes by it."""
    codebook = codebook.to(torch.promote_types(latent.dtype, torch.float32))
    flat, flat_indices = latent.detach().reshape(-1), indices.reshape(-1)
    given = flat, flat_indices, codebook, zero_below, gradient
    return (in_machine_code(*given) if on_processor(flat) and len(codebook) > 1 else None) or _by_operators(*given)


def _by_operators(
    latent: Tensor, indices: Tensor, codebook: Tensor, zero_below: float, gradient: Tensor | None
) -> Pulled:
    slope = None if gradient is None else torch.zeros_like(latent, dtype=torch.float32)
    total, count = torch.zeros((), dtype=torch.float64, device=latent.device), 0
    find = Hash(codebook)
    for block in blocks(latent):
        chosen = (indices[block] < 0).nonzero().squeeze(1)
        weights = latent[block].index_select(0, chosen).to(codebook.dtype)
        values, slopes = _pull_in_block(weights, _above(find, weights), codebook, zero_below)
        total += values.sum(dtype=torch.float64)
        count += len(chosen)
        if slope is not None and gradient is not None:
            slopes = (slopes * gradient).clamp_(-STEEPEST, STEEPEST)
            slope[block].index_copy_(0, chosen, slopes.float())
    return total, count, slope


def _above(find: Hash, weights: Tensor) -> Tensor:
    """Count the codewords below each weight, int32[n]: the position of the one above it."""
    nearest, codewords = torch.empty_like(weights, dtype=torch.int32), torch.empty_like(weights)
    find(weights, nearest, codewords)
    return nearest.add_(codewords < weights)


def _pull_in_block(weights: Tensor, above: Tensor, codebook: Tensor, zero_below: float) -> tuple[Tensor, Tensor]:
    """Give the value and its slope for each weight, in their precision, [n] both."""
    safe = weights.abs().clamp_(min=LEAST).copysign_(weights)
    small = weights.abs() < zero_below
    near, near_slope = _distance(weights, safe, codebook, (above - 1).clamp_(min=0), small)
    far, far_slope = _distance(weights, safe, codebook, above.clamp_(max=len(codebook) - 1), small)
    share = (far - near).div_(TEMPERATURE).sigmoid_()  # of the lower codeword; beyond the ends both are the same
    value = torch.lerp(far, near, share)
    near_slope.mul_((value - near).div_(TEMPERATURE).add_(1))
    far_slope.mul_((value - far).div_(TEMPERATURE).add_(1))
    return value, far_slope.lerp_(near_slope, share).clamp_(-STEEPEST, STEEPEST)


def _distance(weights: Tensor, safe: Tensor, codebook: Tensor, indices: Tensor, small: Tensor) -> tuple[Tensor, Tensor]:
    """Give D = |1 - c/w| and its slope for each weight and one codeword, [n] both."""
    codewords = codebook.index_select(0, indices)
    offset = (weights - codewords).masked_fill_((codewords == 0).logical_and_(small), 0)
    ratio = offset.div_(safe)
    slope = ratio.sign().mul_(codewords).div_(safe.square())
    return ratio.abs_().clamp_(max=FURTHEST), slope.clamp_(-STEEPEST, STEEPEST)
