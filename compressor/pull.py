"""The pull of free weights towards their nearest codewords, by relative distance."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from compressor.formats.compiled import compiled
from compressor.hashing import Hash, bounds_between, search_table, write_search
from compressor.indexing import blocks, on_processor

if TYPE_CHECKING:
    from compressor.formats.native import Code
    from compressor.formats.operands import Array, Real, Variable

__all__ = ["pull"]

TEMPERATURE = 0.05  # of the softmin over codewords
STEEPEST = 1e30  # bound of a weight's slope, which grows without bound near zero
LEAST = 1e-15  # magnitude below which a weight is not divided by, nor by its square
RUN = 1 << 12  # weights that machine code works on together
ROWS = 6  # numbers it keeps of each: place, weight, codewords below and above, value, slope
FURTHEST = 1e6  # a relative distance beyond which no codeword has any share


def pull(latent: Tensor, indices: Tensor, codebook: Tensor, zero_below: float) -> tuple[Tensor, int]:
    """Sum ``sum_j softmin_j(D_ij / 0.05) D_ij`` over the free weights, ``D_ij = |w_i - c_j| / |w_i|``.

    The sum over j is over the two codewords on either side of the weight, O(N): others are further, and of little
    weight (divergence: the paper takes all). The gradient is worked out along with the value, so that one tensor of
    the size of ``latent`` is kept for the backward pass.

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
        codebook = codebook.to(torch.promote_types(latent.dtype, torch.float32))
        pulled = _in_machine_code(latent, indices, codebook, zero_below) if len(codebook) > 1 else None
        total, slope, count = pulled or _by_operators(latent, indices, codebook, zero_below)
        ctx.save_for_backward(slope.view(latent.shape))
        ctx.dtype = latent.dtype
        return total, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        most = min(torch.finfo(ctx.dtype).max, STEEPEST)
        return (slope * gradient).clamp_(-most, most).to(ctx.dtype), None, None, None


def _by_operators(latent: Tensor, indices: Tensor, codebook: Tensor, zero_below: float) -> tuple[Tensor, Tensor, int]:
    """Give the sum, float64, the slope of each weight, float32[n], and the number of free weights."""
    latent, indices, find = latent.reshape(-1), indices.reshape(-1), Hash(codebook)
    slope = torch.zeros_like(latent, dtype=torch.float32)
    total, count = torch.zeros((), dtype=torch.float64, device=latent.device), 0
    for block in blocks(latent):
        chosen = (indices[block] < 0).nonzero().squeeze(1)
        weights = latent[block].index_select(0, chosen).to(codebook.dtype)
        values, slopes = _pull_in_block(weights, _above(find, weights), codebook, zero_below)
        total += values.sum(dtype=torch.float64)
        slope[block].index_copy_(0, chosen, slopes.float())
        count += len(chosen)
    return total, slope, count


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


def _in_machine_code(
    latent: Tensor, indices: Tensor, codebook: Tensor, zero_below: float
) -> tuple[Tensor, Tensor, int] | None:
    """Give the same to within rounding, in one pass over float32 on the processor; else None."""
    item = 8 * indices.element_size()
    native = compiled(_write_pull, item, vectorise=True) if on_processor(latent) else None
    if native is None:
        return None
    slope, total = torch.empty(latent.shape), torch.zeros((), dtype=torch.float64)
    ends = torch.cat([codebook[:1], codebook, codebook[-1:]])  # beyond the ends both neighbours are the same
    near, scratch = torch.tensor([zero_below]), torch.empty(ROWS, RUN)
    given = latent, indices, *search_table(bounds_between(codebook)), ends, near
    held = [tensor.contiguous() for tensor in given]  # kept until the call is over
    count = native(*[tensor.data_ptr() for tensor in (*held, slope, total, scratch)], latent.numel())
    return total, slope, count


def _write_pull(code: Code, item: int) -> None:
    """Write a run of weights at a time: find what is around the free ones, work out their slopes, put them back."""
    total, scratch, count = code.array(8, 64), code.array(9, 32), code.number(10)
    rows = [scratch.after(RUN * row) for row in range(ROWS)]
    place, end, kept, free = code.variable(0), code.variable(0), code.variable(0), code.variable(0)
    with code.loop(lambda: place.get() < count):
        after = place.get() + RUN
        end.set((after < count).choose(after, count))
        kept.set(0)
        _write_gather(code, item, rows, (place, end, kept))
        _write_slopes(code, rows, kept)
        _write_return(code, rows, kept, total)
        free.set(free.get() + kept.get())
    code.give(free.get())


def _write_gather(code: Code, item: int, rows: list[Array], run: tuple[Variable, Variable, Variable]) -> None:
    """Put places, weights and codewords below and above of the free ones side by side; 0 as the slope of all."""
    latent, bounds, cut, below, codebook, slopes = (code.array(position, 32) for position in (0, 2, 3, 4, 5, 7))
    indices, (places, weights, lower, upper, *_) = code.array(1, item), rows
    place, end, kept = run
    index = code.variable(0)
    with code.loop(lambda: place.get() < end.get()):
        at = place.get()
        slopes[at] = code.constant(0)
        with code.when(indices[at] >> (item - 1)):  # the sign
            weight, last = latent.real(at), kept.get()
            write_search(code, index, weight, (bounds, cut, below))
            above = index.get() + (codebook.real(index.get() + 1) < weight)
            places[last] = at
            weights.put(last, weight)
            lower.put(last, codebook.real(above))
            upper.put(last, codebook.real(above + 1))
            kept.set(last + 1)
        place.set(at + 1)


def _write_slopes(code: Code, rows: list[Array], kept: Variable) -> None:
    """Work out values and slopes: without a branch, several weights at a time."""
    _, weights, lower, upper, values, slopes = rows
    near, number = code.array(6, 32), code.variable(0)
    with code.loop(lambda: number.get() < kept.get()):
        at = number.get()
        value, slope = _write_value(weights.real(at), (lower.real(at), upper.real(at)), near.real(0))
        values.put(at, value)
        slopes.put(at, slope)
        number.set(at + 1)


def _write_return(code: Code, rows: list[Array], kept: Variable, total: Array) -> None:
    """Sum the values and put the slopes where they belong."""
    places, *_, values, found = rows
    slopes, number = code.array(7, 32), code.variable(0)
    with code.loop(lambda: number.get() < kept.get()):
        at = number.get()
        total.add(0, values.real(at))
        slopes[places[at]] = found[at]
        number.set(at + 1)


def _write_value(weight: Real, neighbours: tuple[Real, Real], zero_below: Real) -> tuple[Real, Real]:
    """Write the steps of ``_pull_in_block`` for one weight."""
    inverse = weight.size().within(LEAST, math.inf).inverse()
    signed = (inverse * -1.0).where(weight < 0.0, inverse)
    is_small = weight.size() < zero_below
    distances, slopes = [], []
    for codeword in neighbours:
        ratio = (weight - codeword) * signed
        counts_as_it = is_small & (((codeword < 0.0) | (codeword > 0.0)) < 1)
        distances.append((codeword * 0.0).where(counts_as_it, ratio.size().within(0.0, FURTHEST)))
        steepness = codeword * inverse * inverse
        slope = steepness.where(ratio > 0.0, (steepness * -1.0).where(ratio < 0.0, 0.0))
        slopes.append(slope.within(-STEEPEST, STEEPEST))
    near, far = distances
    less = ((near - far).size() * (-1 / TEMPERATURE)).exp()
    larger = (less + 1.0).inverse()
    smaller = less * larger  # what 1 - larger would round away can be of a great distance
    is_near = near < far
    near_share, far_share = larger.where(is_near, smaller), smaller.where(is_near, larger)
    value = near * near_share + far * far_share
    near_slope, far_slope = (
        slope * ((value - distance) * (1 / TEMPERATURE) + 1.0)
        for slope, distance in zip(slopes, distances, strict=True)
    )
    return value, (near_slope * near_share + far_slope * far_share).within(-STEEPEST, STEEPEST)
