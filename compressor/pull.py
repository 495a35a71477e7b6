"""The pull of free weights towards their nearest codewords, by relative distance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from compressor.hashing import Hash, blocks

__all__ = ["pull"]

TEMPERATURE = 0.05  # of the softmin over codewords
STEEPEST = 1e30  # bound of a weight's slope, which grows without bound near zero
LEAST = 1e-15  # magnitude below which a weight is not divided by, nor by its square
FURTHEST = 1e6  # a relative distance beyond which no codeword has any share


def pull(latent: Tensor, free: Tensor, codebook: Tensor, zero_below: float) -> Tensor:
    """Sum ``sum_j softmin_j(D_ij / 0.05) D_ij`` over the free weights, ``D_ij = |w_i - c_j| / |w_i|``.

    The sum over j is over the two codewords on either side of the weight, O(N): others are further, and of little
    weight (divergence: the paper takes all). The gradient is worked out along with the value, so that one tensor of
    the size of ``latent`` is kept for the backward pass.

    Args:
        latent: float, any shape.
        free: bool of that shape.
        codebook: float32[K], ascending.
        zero_below: the magnitude below which the distance to the codeword 0 is 0.

    Returns:
        float64 scalar.

    Reference: Subia-Waud, Dasmahapatra, "Weight Fixing Networks", ECCV 2022, section 3.
    """
    result: Tensor = _Pull.apply(latent, free, codebook, zero_below)
    return result


class _Pull(Function):
    @staticmethod
    def forward(ctx: Any, latent: Tensor, free: Tensor, codebook: Tensor, zero_below: float) -> Tensor:
        flat, flat_free = latent.reshape(-1), free.reshape(-1)
        slope = torch.zeros_like(flat, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float64, device=flat.device)
        precision = torch.promote_types(latent.dtype, torch.float32)
        codebook = codebook.to(precision)
        find = Hash(codebook)
        for block in blocks(flat):
            chosen = flat_free[block].nonzero().squeeze(1)
            weights = flat[block].index_select(0, chosen).to(precision)
            values, slopes = _pull_in_block(weights, _above(find, weights), codebook, zero_below)
            total += values.sum(dtype=torch.float64)
            slope[block].index_copy_(0, chosen, slopes.float())
        ctx.save_for_backward(slope.view(latent.shape))
        ctx.dtype = latent.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        most = min(torch.finfo(ctx.dtype).max, STEEPEST)
        return (slope * gradient).clamp_(-most, most).to(ctx.dtype), None, None, None


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
