"""The pull of free weights towards their nearest codewords, by relative distance, beside what is fixed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from compressor.hashing import Hash
from compressor.indexing import blocks, fixed_or_free, on_processor
from compressor.pull_kernel import FURTHEST, LEAST, STEEPEST, TEMPERATURE, Pulled, in_machine_code

__all__ = ["fixed_and_pulled", "pull"]


def fixed_and_pulled(
    latent: Tensor, codebook: Tensor, indices: Tensor, zero_below: float | Tensor
) -> tuple[Tensor, Tensor, int]:
    """Give what ``lookup.fixed`` gives, and the pull on the weights that are free, whose gradients come in one pass.

    The pull is ``sum_j softmin_j(D_ij / 0.05) D_ij`` over the free weights, ``D_ij = |w_i - c_j| / |w_i|``. The sum
    over j is over the two codewords on either side of the weight, O(N): others are further, and of little weight
    (divergence: the paper takes all). Its gradient is worked out in the backward pass from ``latent`` and ``indices``,
    and added to that of the weights: nothing of their size is kept for it.

    Args:
        latent: float, any shape.
        codebook: float32[K], without gradient.
        indices: int8, int16 or int32 of that shape, below 0 where a weight is free.
        zero_below: the magnitude below which the distance to the codeword 0 is 0.

    Returns:
        The weights, of the shape of ``latent``; the sum, float64 scalar; and how many weights are free.

    Reference: Subia-Waud, Dasmahapatra, "Weight Fixing Networks", ECCV 2022, section 3.
    """
    result: tuple[Tensor, Tensor, int] = _FixedAndPulled.apply(latent, codebook, indices, zero_below)
    return result


def pull(latent: Tensor, codebook: Tensor, indices: Tensor, zero_below: float | Tensor) -> tuple[Tensor, int]:
    """Give the pull alone: arguments and result as of ``fixed_and_pulled``."""
    return fixed_and_pulled(latent, codebook, indices, zero_below)[1:]


class _FixedAndPulled(Function):
    @staticmethod
    def forward(
        ctx: Any, latent: Tensor, codebook: Tensor, indices: Tensor, zero_below: float | Tensor
    ) -> tuple[Tensor, Tensor, int]:
        ctx.set_materialize_grads(False)
        ascending = codebook.detach().sort().values.to(torch.promote_types(latent.dtype, torch.float32))
        # Not saved as PyTorch saves: the task's loss and the penalty may be taken backwards one after the other.
        ctx.given = latent.detach(), indices, ascending, zero_below
        total, count = _pull(*ctx.given)
        return fixed_or_free(latent, codebook, indices), total, count

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_weight: Tensor | None, of_total: Tensor | None, of_count: None
    ) -> tuple[Tensor, None, None, None]:
        latent, indices, ascending, zero_below = ctx.given
        if of_weight is None:
            gradient = torch.zeros(latent.shape, dtype=latent.dtype, device=latent.device)
        else:
            none = ascending.new_zeros(len(ascending), dtype=torch.float32)
            gradient = fixed_or_free(of_weight, none, indices).contiguous()
        if of_total is None:
            return gradient, None, None, None
        slopes = gradient if gradient.dtype == torch.float32 else torch.zeros_like(gradient, dtype=torch.float32)
        _pull(latent, indices, ascending, zero_below, of_total, slopes.view(-1))
        if slopes is not gradient:
            most = min(torch.finfo(gradient.dtype).max, STEEPEST)
            gradient += slopes.clamp_(-most, most)
        return gradient, None, None, None


def _pull(
    latent: Tensor,
    indices: Tensor,
    codebook: Tensor,
    zero_below: float | Tensor,
    factor: Tensor | None = None,
    slopes: Tensor | None = None,
) -> Pulled:
    """Pull, and where there are ``slopes`` add to them those of the pull, multiplied by the factor."""
    given = latent.reshape(-1), indices.reshape(-1), codebook, zero_below, factor, slopes
    return (in_machine_code(*given) if on_processor(latent) and len(codebook) > 1 else None) or _by_operators(*given)


def _by_operators(
    latent: Tensor,
    indices: Tensor,
    codebook: Tensor,
    zero_below: float | Tensor,
    factor: Tensor | None,
    slopes: Tensor | None,
) -> Pulled:
    total, count = torch.zeros((), dtype=torch.float64, device=latent.device), 0
    find = Hash(codebook)
    for block in blocks(latent):
        chosen = (indices[block] < 0).nonzero().squeeze(1)
        weights = latent[block].index_select(0, chosen).to(codebook.dtype)
        values, found = _pull_in_block(weights, _above(find, weights), codebook, zero_below)
        total += values.sum(dtype=torch.float64)
        count += len(chosen)
        if slopes is not None and factor is not None:
            slopes[block].index_add_(0, chosen, (found * factor).clamp_(-STEEPEST, STEEPEST).float())
    return total, count


def _above(find: Hash, weights: Tensor) -> Tensor:
    """Count the codewords below each weight, int32[n]: the position of the one above it."""
    nearest, codewords = torch.empty_like(weights, dtype=torch.int32), torch.empty_like(weights)
    find(weights, nearest, codewords)
    return nearest.add_(codewords < weights)


def _pull_in_block(
    weights: Tensor, above: Tensor, codebook: Tensor, zero_below: float | Tensor
) -> tuple[Tensor, Tensor]:
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
