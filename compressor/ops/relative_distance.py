"""The pull of free weights towards their nearest codewords, by relative distance, beside what is fixed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from compressor.ops.gather_scatter import write_codewords, zero_where_assigned
from compressor.ops.nearest import NearestCodeword
from compressor.ops.ownership import own
from compressor.ops.parallel import cache_chunks, on_processor
from compressor.ops.relative_distance_kernel import (
    LARGEST_DISTANCE,
    LARGEST_SLOPE,
    SMALLEST_DIVISOR,
    TEMPERATURE,
    GradAccumulator,
    run_kernel,
)

__all__ = ["frozen_lookup_with_distance", "relative_distance"]


def frozen_lookup_with_distance(
    master: Tensor, codebook: Tensor, indices: Tensor, zero_below: float | Tensor, pulled: Tensor
) -> tuple[Tensor, Tensor]:
    """Give what ``gather_scatter.frozen_lookup`` gives, and a number with the gradient of ``relative_distance``.

    The pull itself is not worked out but in the backward pass, from ``master`` and ``indices``: its slopes are added
    to the gradient of the weights, what ``relative_distance`` gives is put into
    ``pulled``. Nothing of their size is kept for it.

    Args:
        master: float, any shape; takes the codewords where it is not free.
        codebook: float32[K], without gradient.
        indices: int8, int16 or int32 of that shape, below 0 where a weight is free.
        zero_below: as for ``relative_distance``.
        pulled: float64[2], written to when the number's gradient is worked out.

    Returns:
        The weights, in the memory of ``master``; and the number, float64 scalar, 0.
    """
    result: tuple[Tensor, Tensor] = _FrozenLookupWithDistance.apply(master, codebook, indices, zero_below, pulled)[:2]
    return result


def relative_distance(master: Tensor, codebook: Tensor, indices: Tensor, zero_below: float | Tensor) -> Tensor:
    """Give the pull on the free weights, and how many they are: float64[2], without gradient.

    The pull is ``sum_j softmin_j(D_ij / 0.05) D_ij`` over the free weights, ``D_ij = |w_i - c_j| / |w_i|``. The sum
    over j is over the two codewords on either side of the weight, O(N): others are further, and of little weight
    (divergence: the paper takes all).

    Args:
        master: float, any shape.
        codebook: float32[K].
        indices: int8, int16 or int32 of that shape, below 0 where a weight is free.
        zero_below: the magnitude below which the distance to the codeword 0 is 0.

    Reference: Subia-Waud, Dasmahapatra, "Weight Fixing Networks", ECCV 2022, section 3.
    """
    return _relative_distance(master.detach(), indices, codebook.detach(), zero_below)


class _FrozenLookupWithDistance(Function):
    @staticmethod
    def forward(
        ctx: Any, master: Tensor, codebook: Tensor, indices: Tensor, zero_below: float | Tensor, pulled: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Not saved as PyTorch saves: the task's loss and the penalty may be taken backwards one after the other.
        ctx.given = master.detach(), indices, codebook.detach(), zero_below
        ctx.pulled = pulled
        write_codewords(master, codebook, indices)
        return master, pulled.new_zeros(()), master.new_empty(())

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: Tensor, of_pull: Tensor, companion: Tensor
    ) -> tuple[Tensor, None, None, None, None]:
        master, indices, codebook, zero_below = ctx.given
        gradient = own(gradient, companion)
        if of_pull.device.type == "cpu" and not of_pull:  # elsewhere it would have to be waited for
            zero_where_assigned(gradient, indices)
        else:
            ctx.pulled.copy_(
                _relative_distance(master, indices, codebook, zero_below, GradAccumulator(of_pull, gradient))
            )
        return gradient, None, None, None, None


def _relative_distance(
    master: Tensor, indices: Tensor, codebook: Tensor, zero_below: float | Tensor, onto: GradAccumulator | None = None
) -> Tensor:
    given = master, indices, codebook, zero_below, onto
    native = on_processor(master) and on_processor(codebook) and (onto is None or on_processor(onto.gradient))
    found = run_kernel(*given) if native else None
    return _by_operators(*given) if found is None else found


def _by_operators(
    master: Tensor, indices: Tensor, codebook: Tensor, zero_below: float | Tensor, onto: GradAccumulator | None
) -> Tensor:
    total, count = torch.zeros((), dtype=torch.float64, device=master.device), 0
    codebook = codebook.sort().values.to(torch.promote_types(master.dtype, torch.float32))
    find, master, free = NearestCodeword(codebook), master.reshape(-1), (indices < 0).reshape(-1)
    if onto is not None:
        zero_where_assigned(onto.gradient, indices)
    for block in cache_chunks(master):
        chosen = free[block].nonzero().squeeze(1)
        weights = master[block].index_select(0, chosen).to(codebook.dtype)
        values, slopes = _distance_in_chunk(weights, _above(find, weights), codebook, zero_below)
        total += values.sum(dtype=torch.float64)
        count += len(chosen)
        if onto is not None:
            most = min(torch.finfo(onto.gradient.dtype).max, LARGEST_SLOPE)
            added = (slopes * onto.factor).clamp_(-most, most).to(onto.gradient.dtype)
            onto.gradient.view(-1)[block].index_add_(0, chosen, added)
    return torch.stack([total, total.new_tensor(count)])


def _above(find: NearestCodeword, weights: Tensor) -> Tensor:
    """Count the codewords below each weight, int32[n]: the position of the one above it."""
    nearest, codewords = torch.empty_like(weights, dtype=torch.int32), torch.empty_like(weights)
    find(weights, nearest, codewords)
    return nearest.add_(codewords < weights)


def _distance_in_chunk(
    weights: Tensor, above: Tensor, codebook: Tensor, zero_below: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Give the value and its slope for each weight, in their precision, [n] both."""
    safe = weights.abs().clamp_(min=SMALLEST_DIVISOR).copysign_(weights)
    small = weights.abs() < zero_below
    near, near_slope = _distance(weights, safe, codebook, (above - 1).clamp_(min=0), small)
    far, far_slope = _distance(weights, safe, codebook, above.clamp_(max=len(codebook) - 1), small)
    share = (far - near).div_(TEMPERATURE).sigmoid_()  # of the lower codeword; beyond the ends both are the same
    value = torch.lerp(far, near, share)
    near_slope.mul_((value - near).div_(TEMPERATURE).add_(1))
    far_slope.mul_((value - far).div_(TEMPERATURE).add_(1))
    return value, far_slope.lerp_(near_slope, share).clamp_(-LARGEST_SLOPE, LARGEST_SLOPE)


def _distance(weights: Tensor, safe: Tensor, codebook: Tensor, indices: Tensor, small: Tensor) -> tuple[Tensor, Tensor]:
    """Give D = |1 - c/w| and its slope for each weight and one codeword, [n] both."""
    codewords = codebook.index_select(0, indices)
    offset = (weights - codewords).masked_fill_((codewords == 0).logical_and_(small), 0)
    ratio = offset.div_(safe)
    slope = ratio.sign().mul_(codewords).div_(safe.square())
    return ratio.abs_().clamp_(max=LARGEST_DISTANCE), slope.clamp_(-LARGEST_SLOPE, LARGEST_SLOPE)
