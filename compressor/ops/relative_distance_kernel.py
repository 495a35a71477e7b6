"""The pull of free weights as machine code: the steps of ``relative_distance``, several weights at a time."""

from __future__ import annotations

import functools
import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from compressor.formats.jit.cache import compiled_kernel
from compressor.ops.nearest import search_table, write_search
from compressor.ops.parallel import Argument, Sliced, parallel_for, thread_slices

if TYPE_CHECKING:
    from compressor.formats.jit.builder import Code
    from compressor.formats.jit.values import Array, Real, Value, Variable

__all__ = ["LARGEST_DISTANCE", "LARGEST_SLOPE", "SMALLEST_DIVISOR", "TEMPERATURE", "GradAccumulator", "run_kernel"]

TEMPERATURE = 0.05  # of the softmin over codewords
LARGEST_SLOPE = 1e30  # bound of a weight's slope, which grows without bound near zero
SMALLEST_DIVISOR = 1e-15  # magnitude below which a weight is not divided by, nor by its square
LARGEST_DISTANCE = 1e6  # a relative distance beyond which no codeword has any share
CHUNK = 1 << 12  # weights that machine code works on together
ROWS = 6  # numbers it keeps of each: place, weight, codewords below and above, value, slope
LANES = 8  # sums kept side by side, so that an addition need not wait for the last one
APART = 32  # float64 before a thread's rows: its sums, which share a cache line with nothing else that is written to
FEW_CODEWORDS = 4, 8, 16, 32  # codewords, as in the first rounds, when most weights are free: a search takes longer


class GradAccumulator(NamedTuple):
    """Where slopes go: ``factor`` times each is added to the ``gradient`` of what is free; the rest of it becomes 0."""

    factor: float | Tensor
    gradient: Tensor


def run_kernel(
    master: Tensor, indices: Tensor, codebook: Tensor, zero_below: float | Tensor, onto: GradAccumulator | None
) -> Tensor | None:
    """Do what the stock operators do, to within rounding, in one pass over float32 on the processor; else None."""
    few = next((most for most in FEW_CODEWORDS if len(codebook) <= most), 0)
    native = compiled_kernel(_write_kernel, 8 * indices.element_size(), few, vectorise=True)
    if native is None:
        return None
    settings = np.array([zero_below, onto.factor if onto else 0.0], np.float32)
    master, indices, cuts = master.contiguous(), indices.contiguous(), thread_slices(master.numel())
    own = np.empty((len(cuts), APART + ROWS * CHUNK // 2))  # float64; of each part its sums, and rows of float32
    begin, each = own.ctypes.data, own.strides[0]
    arguments: list[Argument] = [Sliced(master), Sliced(indices), [settings.ctypes.data] * len(cuts)]
    arguments += [Sliced(onto.gradient) if onto else [0] * len(cuts)]
    arguments += [[begin + each * part for part in range(len(cuts))], *_tables(codebook.numpy().tobytes())]
    free = parallel_for(native, cuts, arguments)
    return torch.tensor([own[:, :LANES].sum(), sum(free)], dtype=torch.float64, device="cpu")


@functools.lru_cache(maxsize=8)
def _tables(codebook: bytes) -> tuple[Tensor, ...]:
    """Make what codewords, float32[K] in any order, are searched in: the same for all tensors and many steps."""
    ascending = torch.from_numpy(np.sort(np.frombuffer(codebook, np.float32)))
    beyond = ascending[-1:].expand(1 + FEW_CODEWORDS[-1])  # the ends: both neighbours are the same
    return *search_table(ascending), torch.cat([ascending[:1], ascending, beyond])


def _write_kernel(code: Code, item: int, few: int) -> None:
    """Write a run of weights at a time: find what is around the free ones, work out their slopes, add them."""
    total, scratch, count = code.array(4, 64), code.array(4, 32), code.number(9)
    rows = [scratch.after(2 * APART + CHUNK * row) for row in range(ROWS)]
    begin, end, kept, free = code.variable(0), code.variable(0), code.variable(0), code.variable(0)
    for lane in range(LANES):
        total[lane] = code.constant(0)
    with code.loop(lambda: begin.get() < count):
        after = begin.get() + CHUNK
        end.set((after < count).choose(after, count))
        kept.set(0)
        _write_free(code, item, rows, (begin.get(), end.get()), kept)
        if few:
            _write_few(code, rows, kept, few)
        else:
            _write_neighbours(code, rows, kept)
        _write_values(code, rows, kept)
        _write_sum(code, rows, kept, total)
        with code.when(code.number(3)):
            _write_gradient(code, item, (begin.get(), end.get()))
            _write_return(code, rows, kept)
        free.set(free.get() + kept.get())
        begin.set(end.get())
    code.give(free.get())


def _write_free(code: Code, item: int, rows: list[Array], run: tuple[Value, Value], kept: Variable) -> None:
    """Put the free ones side by side, and their places: without a branch for each, where some of a word's are free."""
    (places, weights, *_), master = rows, code.array(0, 32)
    indices, each = code.array(1, item), 64 // item
    signs = sum(1 << item * lane + item - 1 for lane in range(each))
    place = code.variable(run[0])

    def keep(at: Value, is_free: Value) -> None:
        places[kept.get()] = at  # written over by the next where this one is not free; there is room for all of a run
        weights[kept.get()] = master[at]
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
    """Find the weights, and the codewords below and above each."""
    _, weights, lower, upper, *_ = rows
    codebook, table = code.array(8, 32), (code.array(5, 32), code.array(6, 32), code.array(7, 32))
    number, index = code.variable(0), code.variable(0)
    with code.loop(lambda: number.get() < kept.get()):
        at = number.get()
        weight = weights.real(at)
        write_search(code, index, weight, table)  # how many codewords are below it
        lower.put(at, codebook.real(index.get()))
        upper.put(at, codebook.real(index.get() + 1))
        number.set(at + 1)


def _write_few(code: Code, rows: list[Array], kept: Variable, few: int) -> None:
    """Find them by comparing with each, several weights at a time."""
    _, weights, lower, upper, *_ = rows
    codebook, number = code.array(8, 32), code.variable(0)
    known = [codebook.real(place) for place in range(few + 2)]
    with code.loop(lambda: number.get() < kept.get()):
        at = number.get()
        weight, below, above = weights.real(at), known[0], known[0]
        for codeword, following in itertools.pairwise(known[1:]):
            is_above = codeword < weight
            below, above = codeword.where(is_above, below), following.where(is_above, above)
        lower.put(at, below)
        upper.put(at, above)
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
        slopes.put(at, (slope * factor).within(-LARGEST_SLOPE, LARGEST_SLOPE))
        number.set(at + 1)


def _write_sum(code: Code, rows: list[Array], kept: Variable, total: Array) -> None:
    """Add up the values."""
    values, number = rows[4], code.variable(0)
    with code.loop(lambda: number.get() + (LANES - 1) < kept.get()):
        for lane in range(LANES):
            total.add(lane, values.real(number.get() + lane))
        number.set(number.get() + LANES)
    with code.loop(lambda: number.get() < kept.get()):
        total.add(0, values.real(number.get()))
        number.set(number.get() + 1)


def _write_gradient(code: Code, item: int, run: tuple[Value, Value]) -> None:
    """Keep the gradient of what is free, and put 0 for what is not."""
    indices, gradient = code.array(1, item), code.array(3, 32)
    place = code.variable(run[0])
    with code.loop(lambda: place.get() < run[1]):
        at = place.get()
        gradient[at] = (indices[at] >> (item - 1)).choose(gradient[at], 0)
        place.set(at + 1)


def _write_return(code: Code, rows: list[Array], kept: Variable) -> None:
    """Add the slopes where they belong."""
    (places, *_, slopes), gradient, number = rows, code.array(3, 32), code.variable(0)
    with code.loop(lambda: number.get() < kept.get()):
        place = places[number.get()]
        gradient.put(place, gradient.real(place) + slopes.real(number.get()))
        number.set(number.get() + 1)


def _write_value(weight: Real, neighbours: tuple[Real, Real], zero_below: Real) -> tuple[Real, Real]:
    """Write the steps of ``pull._pull_in_block`` for one weight."""
    inverse = weight.size().within(SMALLEST_DIVISOR, math.inf).inverse()
    signed = (inverse * -1.0).where(weight < 0.0, inverse)
    is_small = weight.size() < zero_below
    distances, slopes = [], []
    for codeword in neighbours:
        ratio = (weight - codeword) * signed
        counts_as_it = is_small & (((codeword < 0.0) | (codeword > 0.0)) < 1)
        distances.append((codeword * 0.0).where(counts_as_it, ratio.size().at_most(LARGEST_DISTANCE)))
        steepness = codeword * inverse * inverse
        slope = steepness.where(ratio > 0.0, (steepness * -1.0).where(ratio < 0.0, 0.0))
        slopes.append(slope.within(-LARGEST_SLOPE, LARGEST_SLOPE))
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
    return value, (near_slope * near_share + far_slope * far_share).within(-LARGEST_SLOPE, LARGEST_SLOPE)
