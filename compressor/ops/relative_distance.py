"""The relative-distance regulariser: it draws free weights to their nearest codewords, beside assigned ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from compressor.ops.buffer_pool import active_pool
from compressor.ops.gather_scatter import write_codewords, zero_where_assigned
from compressor.ops.nearest import NearestCodeword
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
    master: Tensor, codebook: Tensor, indices: Tensor, zero_below: float | Tensor, measured: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns what ``gather_scatter.frozen_lookup`` does, and a number with the gradient of ``relative_distance``.

    The distance itself is computed in the backward pass, from ``master`` and ``indices``, in one pass with the gradient
    of the weights, to which its slopes are added: nothing of the weights' size is kept for it.

    Args:
        master: float, any shape; overwritten by the codewords where it is not free.
        codebook: float32[K], without gradient.
        indices: int8, int16 or int32 of that shape, below 0 where a weight is free.
        zero_below: as for ``relative_distance``.
        measured: float64[2], which the backward pass of the number overwrites with what ``relative_distance`` returns.

    Returns:
        The weights, in the memory of ``master``; and the number, float64 scalar, 0.
    """
    result: tuple[Tensor, Tensor] = _FrozenLookupWithDistance.apply(master, codebook, indices, zero_below, measured)
    return result


def relative_distance(master: Tensor, codebook: Tensor, indices: Tensor, zero_below: float | Tensor) -> Tensor:
    """Returns the regulariser's sum over the free weights, and how many they are: float64[2], without gradient.

    The sum is ``sum_i sum_j softmin_j(D_ij / 0.05) D_ij`` over the free weights i, ``D_ij = |w_i - c_j| / |w_i|``. The
    sum over j is over the two codewords on either side of the weight, which takes O(N): others are further away and
    count little (divergence: the paper takes all).

    Args:
        master: float, any shape.
        codebook: float32[K].
        indices: int8, int16 or int32 of that shape, below 0 where a weight is free.
        zero_below: magnitude below which the distance to the codeword 0 is 0.

    Reference: Subia-Waud, Dasmahapatra, "Weight Fixing Networks", ECCV 2022, section 3.
    """
    return _relative_distance(master.detach(), indices, codebook.detach(), zero_below)


class _FrozenLookupWithDistance(Function):
    @staticmethod
    def forward(
        ctx: Any, master: Tensor, codebook: Tensor, indices: Tensor, zero_below: float | Tensor, measured: Tensor
    ) -> tuple[Tensor, Tensor]:
        # Not by save_for_backward: the task's loss and the penalty may go backwards one after the other.
        ctx.inputs = master.detach(), indices, codebook.detach(), zero_below
        ctx.measured, ctx.pool = measured, active_pool()
        write_codewords(master, codebook, indices)
        return master, measured.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, factor: Tensor) -> tuple[Tensor, None, None, None, None]:
        master, indices, codebook, zero_below = ctx.inputs
        to_master = ctx.pool.empty(gradient.shape, gradient.dtype, gradient.device)
        if factor.device.type == "cpu" and not factor:  # on a GPU, to read the factor would be to wait for it
            zero_where_assigned(gradient, indices, to_master)
        else:
            accumulator = GradAccumulator(factor, gradient, to_master)
            ctx.measured.copy_(_relative_distance(master, indices, codebook, zero_below, accumulator))
        return to_master, None, None, None, None


def _relative_distance(
    master: Tensor,
    indices: Tensor,
    codebook: Tensor,
    zero_below: float | Tensor,
    accumulator: GradAccumulator | None = None,
) -> Tensor:
    arguments = master, indices, codebook, zero_below, accumulator
    fits = on_processor(master) and on_processor(codebook) and (accumulator is None or on_processor(accumulator.result))
    measured = run_kernel(*arguments) if fits else None
    return _by_operators(*arguments) if measured is None else measured


def _by_operators(
    master: Tensor,
    indices: Tensor,
    codebook: Tensor,
    zero_below: float | Tensor,
    accumulator: GradAccumulator | None,
) -> Tensor:
    """Computes what ``run_kernel`` does with the stock operators, on any device and for any dtype."""
    total, count = torch.zeros((), dtype=torch.float64, device=master.device), 0
    codebook = codebook.sort().values.to(torch.promote_types(master.dtype, torch.float32))
    search, master, free = NearestCodeword(codebook), master.reshape(-1), (indices < 0).reshape(-1)
    if accumulator is not None:
        zero_where_assigned(accumulator.gradient, indices, accumulator.result)
    for chunk in cache_chunks(master):
        places = free[chunk].nonzero().squeeze(1)
        weights = master[chunk].index_select(0, places).to(codebook.dtype)
        values, slopes = _distance_in_chunk(weights, _position_above(search, weights), codebook, zero_below)
        total += values.sum(dtype=torch.float64)
        count += len(places)
        if accumulator is not None:
            result = accumulator.result
            bound = min(torch.finfo(result.dtype).max, LARGEST_SLOPE)
            added = (slopes * accumulator.factor).clamp_(-bound, bound).to(result.dtype)
            result.view(-1)[chunk].index_add_(0, places, added)
    return torch.stack([total, total.new_tensor(count)])


def _position_above(search: NearestCodeword, weights: Tensor) -> Tensor:
    """Returns the number of codewords below each weight, int32[n]: the position of the one above it."""
    positions, codewords = torch.empty_like(weights, dtype=torch.int32), torch.empty_like(weights)
    search(weights, positions, codewords)
    return positions.add_(codewords < weights)


def _distance_in_chunk(
    weights: Tensor, above: Tensor, codebook: Tensor, zero_below: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the regulariser's value and its slope for each weight, in the weights' precision, [n] both."""
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
    """Returns D = |1 - c/w| and its slope for each weight and one codeword, [n] both."""
    codewords = codebook.index_select(0, indices)
    offset = (weights - codewords).masked_fill_((codewords == 0).logical_and_(small), 0)
    ratio = offset.div_(safe)
    slope = ratio.sign().mul_(codewords).div_(safe.square())
    return ratio.abs_().clamp_(max=LARGEST_DISTANCE), slope.clamp_(-LARGEST_SLOPE, LARGEST_SLOPE)
