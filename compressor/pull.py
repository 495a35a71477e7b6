"""The pull of free weights towards their nearest codewords, by relative distance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

__all__ = ["pull"]

TEMPERATURE = 0.05  # of the softmin over codewords
BLOCK = 1 << 17  # weights handled at a time, so that temporaries stay small
STEEPEST = 1e30  # bound of a weight's slope, which grows without bound near zero
LEAST = 1e-60  # magnitude below which a weight is not divided by


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
        for start in range(0, flat.numel(), BLOCK):
            block = slice(start, start + BLOCK)
            chosen = flat_free[block]
            values, slopes = _pull_in_block(flat[block][chosen].double(), codebook.double(), zero_below)
            total += values.sum()
            slope[block][chosen] = slopes.float()
        ctx.save_for_backward(slope.view(latent.shape))
        ctx.dtype = latent.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        most = min(torch.finfo(ctx.dtype).max, STEEPEST)
        return (slope * gradient).clamp_(-most, most).to(ctx.dtype), None, None, None


def _pull_in_block(weights: Tensor, codebook: Tensor, zero_below: float) -> tuple[Tensor, Tensor]:
    """Give the value and its slope for each weight, float64[n] both."""
    upper = torch.bucketize(weights, codebook)
    sides = torch.stack([(upper - 1).clamp(min=0), upper.clamp(max=len(codebook) - 1)])  # beyond the ends the same
    codewords = codebook[sides]
    safe = torch.where(weights < 0, -1.0, 1.0) * weights.abs().clamp(min=LEAST)
    offset = weights - codewords
    offset[(codewords == 0) & (weights.abs() < zero_below)] = 0
    distance = offset.abs() / safe.abs()
    share = torch.softmax(-distance / TEMPERATURE, dim=0)
    value = (share * distance).sum(0)
    by_distance = share * (1 - (distance - value) / TEMPERATURE)
    by_weight = (offset * safe).sign() * codewords / safe.square()  # D = |1 - c/w|
    return value, (by_distance * by_weight).sum(0).clamp(-STEEPEST, STEEPEST)
