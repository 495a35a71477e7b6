"""The relative-distance regulariser as machine code: the steps of ``relative_distance``, several weights at a time."""

from __future__ import annotations

import functools
import itertools
import math
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

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
CHUNK = 1 << 12  # weights the kernel works on at a time
LANES = 8  # sums kept side by side, so that an addition need not wait for the previous one
PADDING = 32  # float64 before a thread's rows: its sums, which share a cache line with nothing else that is written to
FEW_CODEWORDS = 4, 8, 16, 32  # up to so many, as in the first rounds, when most weights are free, no search is faster

T = TypeVar("T")


class GradAccumulator(NamedTuple):
    """The gradient that slopes are added to.

    Args:
        factor: what each slope is multiplied by.
        gradient: float, of the weights' shape; it stays as it is.
        result: of its shape and dtype, contiguous, in memory of its own: takes the gradient plus the slope of each free
            weight, and 0 for each that is assigned.
    """

    factor: float | Tensor
    gradient: Tensor
    result: Tensor


class _Arguments(NamedTuple, Generic[T]):
    """The kernel's arguments in their order: as the caller passes them, or as the arrays the kernel reads."""

    master: T  # float32, one per weight
    indices: T  # signed int, one per weight, below 0 where it is free
    settings: T  # float32[2]: zero_below, and the factor of the slopes
    gradient: T  # float32, one per weight; null where no slopes are asked for
    result: T  # likewise, written to
    scratch: T  # a thread's own: float64[PADDING] of sums, then the float32 rows of _Rows
    bounds: T  # float32: the first three are the table that codewords are searched in, see ``nearest.search_table``
    cut: T  # float32[2]
    below: T  # int32
    neighbours: T  # float32: the codewords ascending, the first and the last twice


class _Rows(NamedTuple):
    """What the kernel keeps of each free weight of a chunk, 32 bits each."""

    places: Array
    weights: Array
    lower: Array  # the codeword below the weight
    upper: Array  # the codeword above it
    values: Array
    slopes: Array


def run_kernel(
    master: Tensor,
    indices: Tensor,
    codebook: Tensor,
    zero_below: float | Tensor,
    accumulator: GradAccumulator | None,
) -> Tensor | None:
    """Returns what ``relative_distance`` does, to within rounding, in one pass over float32 on the processor.

    Args:
        master, indices, codebook, zero_below: as for ``relative_distance``.
        accumulator: where slopes are added; None: nowhere, they are not computed.

    Returns:
        float64[2]; None where there is no compiler.
    """
    few = next((count for count in FEW_CODEWORDS if len(codebook) <= count), 0)
    kernel = compiled_kernel(_write_kernel, 8 * indices.element_size(), few, vectorise=True)
    if kernel is None:
        return None
    slices = thread_slices(master.numel())
    null: Argument = [0] * len(slices)
    settings = np.array([zero_below, accumulator.factor if accumulator else 0.0], np.float32)
    scratch = np.empty((len(slices), PADDING + len(_Rows._fields) * CHUNK // 2))  # float64, two of a row's in each
    first, step = scratch.ctypes.data, scratch.strides[0]
    bounds, cut, below, neighbours = _tables(codebook.numpy().tobytes())
    arguments: _Arguments[Argument] = _Arguments(
        master=Sliced(master.contiguous()),
        indices=Sliced(indices.contiguous()),
        settings=[settings.ctypes.data] * len(slices),
        gradient=Sliced(accumulator.gradient.contiguous()) if accumulator else null,
        result=Sliced(accumulator.result) if accumulator else null,
        scratch=[first + step * number for number in range(len(slices))],
        bounds=bounds, cut=cut, below=below, neighbours=neighbours,
    )  # fmt: skip
    free = parallel_for(kernel, slices, arguments)
    return torch.tensor([scratch[:, :LANES].sum(), sum(free)], dtype=torch.float64, device="cpu")


@functools.lru_cache(maxsize=8)
def _tables(codebook: bytes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Makes the tables that codewords, float32[K] in any order, are searched in: the same for all tensors of a step."""
    ascending = torch.from_numpy(np.sort(np.frombuffer(codebook, np.float32)))
    beyond = ascending[-1:].expand(1 + FEW_CODEWORDS[-1])  # past the ends both neighbours are the same
    return *search_table(ascending), torch.cat([ascending[:1], ascending, beyond])


def _write_kernel(code: Code, bits: int, few: int) -> None:
    """Builds the kernel, which takes a chunk of weights at a time and returns the number of free ones.

    Args:
        code: written to.
        bits: of an index.
        few: as many codewords as are compared with every weight; 0: they are searched.
    """
    widths = _Arguments(
        master=32, indices=bits, settings=32, gradient=32, result=32, scratch=32, bounds=32, cut=32, below=32,
        neighbours=32,
    )  # fmt: skip
    arrays = _Arguments(*(code.array(position, width) for position, width in enumerate(widths)))
    count = code.number(len(arrays))
    wants_slopes = code.number(_Arguments._fields.index("gradient"))  # its address
    total = code.array(_Arguments._fields.index("scratch"), 64)
    rows = _Rows(*(arrays.scratch.after(2 * PADDING + CHUNK * row) for row in range(len(_Rows._fields))))
    begin, end, kept, free = code.variable(0), code.variable(0), code.variable(0), code.variable(0)
    for lane in range(LANES):
        total[lane] = code.constant(0)
    with code.loop(lambda: begin.get() < count):
        after = begin.get() + CHUNK
        end.set((after < count).choose(after, count))
        kept.set(0)
        _write_free(code, bits, arrays, rows, (begin.get(), end.get()), kept)
        if few:
            _write_comparisons(code, arrays, rows, kept, few)
        else:
            _write_neighbours(code, arrays, rows, kept)
        _write_values(code, arrays, rows, kept)
        _write_sum(code, rows, kept, total)
        with code.when(wants_slopes):
            _write_gradient(code, bits, arrays, (begin.get(), end.get()))
            _write_slopes(code, arrays, rows, kept)
        free.set(free.get() + kept.get())
        begin.set(end.get())
    code.give(free.get())


def _write_free(
    code: Code, bits: int, arrays: _Arguments[Array], rows: _Rows, chunk: tuple[Value, Value], kept: Variable
) -> None:
    """Gathers the free weights and their places; a word of indices is passed over at once where none is free."""
    indices, per_word = arrays.indices, 64 // bits
    signs = sum(1 << bits * lane + bits - 1 for lane in range(per_word))
    place = code.variable(chunk[0])

    def keep(at: Value, is_free: Value) -> None:
        # Without a branch: where this weight is not free, the next one overwrites it. A row has room for a whole chunk.
        rows.places[kept.get()] = at
        rows.weights[kept.get()] = arrays.master[at]
        kept.set(kept.get() + is_free)

    with code.loop(lambda: place.get() + (per_word - 1) < chunk[1]):
        word = indices.word_at(place.get() * (bits // 8)) & code.constant(signs - (1 << 64))
        with code.when(word):
            for lane in range(per_word):
                keep(place.get() + lane, word >> (bits * lane + bits - 1) & 1)
        place.set(place.get() + per_word)
    with code.loop(lambda: place.get() < chunk[1]):
        keep(place.get(), indices[place.get()] >> (bits - 1))
        place.set(place.get() + 1)


def _write_neighbours(code: Code, arrays: _Arguments[Array], rows: _Rows, kept: Variable) -> None:
    """Searches the codewords below and above each weight."""
    table = arrays.bounds, arrays.cut, arrays.below
    number, index = code.variable(0), code.variable(0)
    with code.loop(lambda: number.get() < kept.get()):
        at = number.get()
        write_search(code, index, rows.weights.real(at), table)  # the number of codewords below the weight
        rows.lower.put(at, arrays.neighbours.real(index.get()))
        rows.upper.put(at, arrays.neighbours.real(index.get() + 1))
        number.set(at + 1)


def _write_comparisons(code: Code, arrays: _Arguments[Array], rows: _Rows, kept: Variable, few: int) -> None:
    """Finds the codewords below and above each weight by comparing it with all, several weights at a time."""
    number = code.variable(0)
    codewords = [arrays.neighbours.real(place) for place in range(few + 2)]
    with code.loop(lambda: number.get() < kept.get()):
        at = number.get()
        weight, below, above = rows.weights.real(at), codewords[0], codewords[0]
        for codeword, following in itertools.pairwise(codewords[1:]):
            is_above = codeword < weight
            below, above = codeword.where(is_above, below), following.where(is_above, above)
        rows.lower.put(at, below)
        rows.upper.put(at, above)
        number.set(at + 1)


def _write_values(code: Code, arrays: _Arguments[Array], rows: _Rows, kept: Variable) -> None:
    """Computes values and slopes without a branch, several weights at a time."""
    number = code.variable(0)
    zero_below, factor = arrays.settings.real(0), arrays.settings.real(1)
    with code.loop(lambda: number.get() < kept.get()):
        at = number.get()
        neighbours = rows.lower.real(at), rows.upper.real(at)
        value, slope = _write_value(rows.weights.real(at), neighbours, zero_below)
        rows.values.put(at, value)
        rows.slopes.put(at, (slope * factor).within(-LARGEST_SLOPE, LARGEST_SLOPE))
        number.set(at + 1)


def _write_sum(code: Code, rows: _Rows, kept: Variable, total: Array) -> None:
    """Adds up the values."""
    number = code.variable(0)
    with code.loop(lambda: number.get() + (LANES - 1) < kept.get()):
        for lane in range(LANES):
            total.add(lane, rows.values.real(number.get() + lane))
        number.set(number.get() + LANES)
    with code.loop(lambda: number.get() < kept.get()):
        total.add(0, rows.values.real(number.get()))
        number.set(number.get() + 1)


def _write_gradient(code: Code, bits: int, arrays: _Arguments[Array], chunk: tuple[Value, Value]) -> None:
    """Copies the gradient of free weights to the result, and writes 0 for assigned ones."""
    place = code.variable(chunk[0])
    with code.loop(lambda: place.get() < chunk[1]):
        at = place.get()
        arrays.result[at] = (arrays.indices[at] >> (bits - 1)).choose(arrays.gradient[at], 0)
        place.set(at + 1)


def _write_slopes(code: Code, arrays: _Arguments[Array], rows: _Rows, kept: Variable) -> None:
    """Adds the slopes to the result, at the places of their weights."""
    number = code.variable(0)
    with code.loop(lambda: number.get() < kept.get()):
        place = rows.places[number.get()]
        arrays.result.put(place, arrays.result.real(place) + rows.slopes.real(number.get()))
        number.set(number.get() + 1)


def _write_value(weight: Real, neighbours: tuple[Real, Real], zero_below: Real) -> tuple[Real, Real]:
    """Computes the value and the slope of one weight, by the steps of ``relative_distance._distance_in_chunk``."""
    inverse = weight.size().within(SMALLEST_DIVISOR, math.inf).inverse()
    signed = (inverse * -1.0).where(weight < 0.0, inverse)
    is_small = weight.size() < zero_below
    distances, slopes = [], []
    for codeword in neighbours:
        ratio = (weight - codeword) * signed
        counts_as_zero = is_small & (((codeword < 0.0) | (codeword > 0.0)) < 1)
        distances.append((codeword * 0.0).where(counts_as_zero, ratio.size().at_most(LARGEST_DISTANCE)))
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
