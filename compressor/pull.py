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
    from compressor.formats.operands import Array, Real, Value, Variable

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


Pulled = tuple[Tensor, int, Tensor | None]
"""The sum, float64; the number of free weights; where asked for, the slope of each weight, float32[n]."""


def _pull(latent: Tensor, indices: Tensor, codebook: Tensor, zero_below: float, gradient: Tensor | None) -> Pulled:
    """Pull, and where a ``gradient`` is given multiply the slopes by it."""
    codebook = codebook.to(torch.promote_types(latent.dtype, torch.float32))
    flat, flat_indices = latent.detach().reshape(-1), indices.reshape(-1)
    given = flat, flat_indices, codebook, zero_below, gradient
    return (_in_machine_code(*given) if on_processor(flat) and len(codebook) > 1 else None) or _by_operators(*given)


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


def _in_machine_code(
    latent: Tensor, indices: Tensor, codebook: Tensor, zero_below: float, gradient: Tensor | None
) -> Pulled | None:
    """Do the same to within rounding, in one pass over float32 on the processor; None without a compiler."""
    native = compiled(_write_pull, 8 * indices.element_size(), gradient is not None, vectorise=True)
    if native is None:
        return None
    slope = None if gradient is None else torch.zeros_like(latent)
    total = torch.zeros((), dtype=torch.float64, device=latent.device)
    scratch = latent.new_empty(ROWS, RUN)
    ends = torch.cat([codebook[:1], codebook, codebook[-1:]])  # beyond the ends both neighbours are the same
    settings = latent.new_tensor([zero_below, 0.0 if gradient is None else float(gradient)])
    given = latent, indices, *search_table(bounds_between(codebook)), ends, settings
    held = [tensor.contiguous() for tensor in given]  # kept until the call is over
    addresses = [tensor.data_ptr() for tensor in held]
    where = 0 if slope is None else slope.data_ptr()
    return total, native(*addresses, where, total.data_ptr(), scratch.data_ptr(), len(latent)), slope


def _write_pull(code: Code, item: int, sloped: bool) -> None:
    """Write a run of weights at a time: find what is around the free ones, work out their slopes, put them back."""
    total, scratch, count = code.array(8, 64), code.array(9, 32), code.number(10)
    rows = [scratch.after(RUN * row) for row in range(ROWS)]
    begin, end, kept, free = code.variable(0), code.variable(0), code.variable(0), code.variable(0)
    with code.loop(lambda: begin.get() < count):
        after = begin.get() + RUN
        end.set((after < count).choose(after, count))
        kept.set(0)
        _write_gather(code, item, rows, (begin.get(), end.get()), kept)
        _write_values(code, rows, kept, sloped)
        _write_sum(code, rows, kept, total)
        if sloped:
            _write_return(code, rows, kept)
        free.set(free.get() + kept.get())
        begin.set(end.get())
    code.give(free.get())


def _write_gather(code: Code, item: int, rows: list[Array], run: tuple[Value, Value], kept: Variable) -> None:
    """Put places, weights and codewords below and above of the free ones side by side."""
    latent, bounds, cut, below, codebook = (code.array(position, 32) for position in (0, 2, 3, 4, 5))
    indices, (places, weights, lower, upper, *_) = code.array(1, item), rows
    place, index = code.variable(run[0]), code.variable(0)
    with code.loop(lambda: place.get() < run[1]):
        at = place.get()
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


def _write_values(code: Code, rows: list[Array], kept: Variable, sloped: bool) -> None:
    """Work out values, and slopes: without a branch, several weights at a time."""
    _, weights, lower, upper, values, slopes = rows
    settings, number = code.array(6, 32), code.variable(0)
    zero_below, gradient = settings.real(0), settings.real(1)
    with code.loop(lambda: number.get() < kept.get()):
        at = number.get()
        value, slope = _write_value(weights.real(at), (lower.real(at), upper.real(at)), zero_below)
        values.put(at, value)
        if sloped:
            slopes.put(at, (slope * gradient).within(-STEEPEST, STEEPEST))
        number.set(at + 1)


def _write_sum(code: Code, rows: list[Array], kept: Variable, total: Array) -> None:
    """Add up the values."""
    values, number = rows[4], code.variable(0)
    with code.loop(lambda: number.get() < kept.get()):
        total.add(0, values.real(number.get()))
        number.set(number.get() + 1)


def _write_return(code: Code, rows: list[Array], kept: Variable) -> None:
    """Put the slopes where they belong."""
    (places, *_, found), slopes, number = rows, code.array(7, 32), code.variable(0)
    with code.loop(lambda: number.get() < kept.get()):
        slopes[places[number.get()]] = found[number.get()]
        number.set(number.get() + 1)


def _write_value(weight: Real, neighbours: tuple[Real, Real], zero_below: Real) -> tuple[Real, Real]:
    """Write the steps of ``_pull_in_block`` for one weight."""
    inverse = weight.size().within(LEAST, math.inf).inverse()
    signed = (inverse * -1.0).where(weight < 0.0, inverse)
    is_small = weight.size() < zero_below
    distances, slopes = [], []
    for codeword in neighbours:
        ratio = (weight - codeword) * signed
        counts_as_it = is_small & (((codeword < 0.0) | (codeword > 0.0)) < 1)
        distances.append((codeword * 0.0).where(counts_as_it, ratio.size().at_most(FURTHEST)))
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
