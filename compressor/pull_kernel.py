"""The pull of free weights as machine code: the steps of ``pull``, several weights at a time."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from compressor.formats.compiled import compiled
from compressor.hashing import search_table, write_search
from compressor.threads import Along, parts, side_by_side

if TYPE_CHECKING:
    from compressor.formats.native import Code
    from compressor.formats.operands import Array, Real, Value, Variable

__all__ = ["FURTHEST", "LEAST", "STEEPEST", "TEMPERATURE", "Pulled", "in_machine_code"]

TEMPERATURE = 0.05  # of the softmin over codewords
STEEPEST = 1e30  # bound of a weight's slope, which grows without bound near zero
LEAST = 1e-15  # magnitude below which a weight is not divided by, nor by its square
FURTHEST = 1e6  # a relative distance beyond which no codeword has any share
RUN = 1 << 12  # weights that machine code works on together
ROWS = 6  # numbers it keeps of each: place, weight, codewords below and above, value, slope
APART = 32  # float64 between the sums of two threads: those that share a cache line wait for each other

Pulled = tuple[Tensor, int]
"""The sum, float64; and the number of free weights."""


def in_machine_code(
    latent: Tensor,
    indices: Tensor,
    codebook: Tensor,
    zero_below: float | Tensor,
    factor: Tensor | None,
    slopes: Tensor | None,
) -> Pulled | None:
    """Do what the stock operators do, to within rounding, in one pass over float32 on the processor; else None."""
    native = compiled(_write_pull, 8 * indices.element_size(), vectorise=True)
    if native is None:
        return None
    tables = _tables(codebook.numpy().tobytes())
    settings = latent.new_tensor([float(zero_below), 0.0 if factor is None else float(factor)])
    latent, indices, cuts = latent.contiguous(), indices.contiguous(), parts(len(latent))
    totals = torch.zeros(len(cuts), APART, dtype=torch.float64, device=latent.device)
    scratch = latent.new_empty(len(cuts), ROWS, RUN)
    own = [[row.data_ptr() for row in held] for held in (totals, scratch)]
    onto = [0] * len(cuts) if slopes is None else Along(slopes)
    free = side_by_side(native, cuts, [Along(latent), Along(indices), settings, onto, *own, *tables])
    return totals[:, 0].sum(), sum(free)


@functools.lru_cache(maxsize=8)
def _tables(codebook: bytes) -> tuple[Tensor, ...]:
    """Make what codewords, float32[K] in any order, are searched in: the same for all tensors and many steps."""
    ascending = torch.from_numpy(np.sort(np.frombuffer(codebook, np.float32)))
    ends = torch.cat([ascending[:1], ascending, ascending[-1:]])  # beyond the ends both neighbours are the same
    return *search_table(ascending), ends


def _write_pull(code: Code, item: int) -> None:
    """Write a run of weights at a time: find what is around the free ones, work out their slopes, add them."""
    total, scratch, count = code.array(4, 64), code.array(5, 32), code.number(10)
    rows = [scratch.after(RUN * row) for row in range(ROWS)]
    begin, end, kept, free = code.variable(0), code.variable(0), code.variable(0), code.variable(0)
    with code.loop(lambda: begin.get() < count):
        after = begin.get() + RUN
        end.set((after < count).choose(after, count))
        kept.set(0)
        _write_free(code, item, rows[0], (begin.get(), end.get()), kept)
        _write_neighbours(code, rows, kept)
        _write_values(code, rows, kept)
        _write_sum(code, rows, kept, total)
        with code.when(code.number(3)):
            _write_return(code, rows, kept)
        free.set(free.get() + kept.get())
        begin.set(end.get())
    code.give(free.get())


def _write_free(code: Code, item: int, places: Array, run: tuple[Value, Value], kept: Variable) -> None:
    """Put the places of the free ones side by side: without a branch for each, where some of a word's are free."""
    indices, each = code.array(1, item), 64 // item
    signs = sum(1 << item * lane + item - 1 for lane in range(each))
    place = code.variable(run[0])

    def keep(at: Value, is_free: Value) -> None:
        places[kept.get()] = at  # written over by the next where this one is not free; there is room for all of a run
        kept.set(kept.get() + is_free)

    with code.loop(lambda: place.get() + (each - 1) < run[1]):
        word = indices.word_at(place.get() * (item // 8)) & code.constant(signs - (1 << 64))
        with code.when(word):
            for lane in range(each):
                keep(place.get() + lane, word >> (item * lane + item - 1) & 1)
        place.set(place.get() + each)
    with code.loop(lambda: place.get() < run[1]):
        keep(place.get(), indices[place.get()] >> (item - 1))
        place.set(place.get() + 1)


def _write_neighbours(code: Code, rows: list[Array], kept: Variable) -> None:
    """Find weights and the codewords below and above them."""
    latent, codebook = code.array(0, 32), code.array(9, 32)
    table = code.array(6, 32), code.array(7, 32), code.array(8, 32)
    places, weights, lower, upper, *_ = rows
    number, index = code.variable(0), code.variable(0)
    with code.loop(lambda: number.get() < kept.get()):
        at = number.get()
        weight = latent.real(places[at])
        write_search(code, index, weight, table)  # how many codewords are below it
        weights.put(at, weight)
        lower.put(at, codebook.real(index.get()))
        upper.put(at, codebook.real(index.get() + 1))
        number.set(at + 1)


def _write_values(code: Code, rows: list[Array], kept: Variable) -> None:
    """Work out values, and slopes: without a branch, several weights at a time."""
    _, weights, lower, upper, values, slopes = rows
    settings, number = code.array(2, 32), code.variable(0)
    zero_below, factor = settings.real(0), settings.real(1)
    with code.loop(lambda: number.get() < kept.get()):
        at = number.get()
        value, slope = _write_value(weights.real(at), (lower.real(at), upper.real(at)), zero_below)
        values.put(at, value)
        slopes.put(at, (slope * factor).within(-STEEPEST, STEEPEST))
        number.set(at + 1)


def _write_sum(code: Code, rows: list[Array], kept: Variable, total: Array) -> None:
    """Add up the values."""
    values, number = rows[4], code.variable(0)
    with code.loop(lambda: number.get() < kept.get()):
        total.add(0, values.real(number.get()))
        number.set(number.get() + 1)


def _write_return(code: Code, rows: list[Array], kept: Variable) -> None:
    """Add the slopes where they belong."""
    (places, *_, found), slopes, number = rows, code.array(3, 32), code.variable(0)
    with code.loop(lambda: number.get() < kept.get()):
        place = places[number.get()]
        slopes.put(place, slopes.real(place) + found.real(number.get()))
        number.set(number.get() + 1)


def _write_value(weight: Real, neighbours: tuple[Real, Real], zero_below: Real) -> tuple[Real, Real]:
    """Write the steps of ``pull._pull_in_block`` for one weight."""
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
