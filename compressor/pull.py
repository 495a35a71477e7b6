"""The pull of free weights towards their nearest codewords, by relative distance."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from compressor.formats.compiled import compiled
from compressor.hashing import Hash, blocks, on_processor, write_search

if TYPE_CHECKING:
    from compressor.formats.native import Code
    from compressor.formats.operands import Real

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
        codebook = codebook.to(torch.promote_types(latent.dtype, torch.float32))
        find = Hash(codebook)
        pull_all = _in_machine_code if find.table and on_processor(latent) else _by_operators
        total, slope = pull_all(latent.reshape(-1), free.reshape(-1), codebook, find, zero_below)
        ctx.save_for_backward(slope.view(latent.shape))
        ctx.dtype = latent.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        most = min(torch.finfo(ctx.dtype).max, STEEPEST)
        return (slope * gradient).clamp_(-most, most).to(ctx.dtype), None, None, None


def _in_machine_code(
    latent: Tensor, free: Tensor, codebook: Tensor, find: Hash, zero_below: float
) -> tuple[Tensor, Tensor]:
    """Give the sum, float64, and the slope of each weight, float32[n], in one pass."""
    native = compiled(_write_pull, 8)
    assert native is not None
    slope, total = torch.empty_like(latent), torch.zeros((), dtype=torch.float64)
    ends = torch.cat([codebook[:1], codebook, codebook[-1:]])  # beyond the ends both neighbours are the same
    near = torch.tensor([zero_below])
    held = [tensor.contiguous() for tensor in (latent, free, *find.table, ends, near)]
    native(*[tensor.data_ptr() for tensor in (*held, slope, total)], len(latent))
    return total, slope


def _by_operators(
    latent: Tensor, free: Tensor, codebook: Tensor, find: Hash, zero_below: float
) -> tuple[Tensor, Tensor]:
    """Give the same with stock operators, to within rounding."""
    slope = torch.zeros_like(latent, dtype=torch.float32)
    total = torch.zeros((), dtype=torch.float64, device=latent.device)
    for block in blocks(latent):
        chosen = free[block].nonzero().squeeze(1)
        weights = latent[block].index_select(0, chosen).to(codebook.dtype)
        values, slopes = _pull_in_block(weights, _above(find, weights), codebook, zero_below)
        total += values.sum(dtype=torch.float64)
        slope[block].index_copy_(0, chosen, slopes.float())
    return total, slope


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


def _write_pull(code: Code, item: int) -> None:
    latent, bounds, cut, below, codebook, near, slopes = (
        code.array(position, 32) for position in (0, 2, 3, 4, 5, 6, 7)
    )
    free, total, count = code.array(1, item), code.array(8, 64), code.number(9)
    place, index = code.variable(0), code.variable(0)
    with code.loop(lambda: place.get() < count):
        at = place.get()
        slopes[at] = code.constant(0)
        with code.when(free[at]):
            weight = latent.real(at)
            write_search(code, index, weight, (bounds, cut, below))
            above = index.get() + (codebook.real(index.get() + 1) < weight)
            neighbours = codebook.real(above), codebook.real(above + 1)
            value, slope = _write_value(weight, neighbours, near.real(0))
            total.add(0, value)
            slopes.put(at, slope)
        place.set(at + 1)
    code.give(0)


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
