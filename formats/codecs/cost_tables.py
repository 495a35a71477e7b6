"""Frequency tables written as costs: what each codeword takes, in fractions of a bit, which few bits say.

A table lists the costs one by one, or gives a curve over the distance from one codeword, the centre: small tensors then
pay for a handful of numbers, whatever their codewords. Costs say nothing of the precision of the coder, and all of it
is integer arithmetic, so that the same counts give the same bytes on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compressor.formats.codecs.bit_text import BitReader, fixed, golomb, golomb_bits
from compressor.formats.codecs.frequencies import FRACTION, fixed_log2
from compressor.formats.errors import FormatError

__all__ = ["CostTables", "choose_tables", "read_tables", "write_tables"]

Ints = NDArray[np.int64]

_EIGHTHS = np.array([65536, 60097, 55109, 50535, 46341, 42495, 38968, 35734])  # 2**(16 - c / 8), rounded
_MOST = 127  # eighths of a bit that a codeword may cost
_UNUSED = 128  # eighths, which stand for a frequency of 0
_LISTED = 15  # in the place of the number of increments of a curve
_FINER = 200, 800  # occurrences of a codeword that justify units of a quarter and an eighth of a bit, not half of one
_ORDERS = range(4)
_ROUNDS = 2  # of improving each increment of a curve by a unit


@dataclass(frozen=True)
class CostTables:
    """Tables of the costs of K codewords.

    Args:
        centre: the codeword that curves and lists begin at.
        unit: q; the numbers of the tables are in units of 2**-q bit.
        order: that of the Golomb code of the numbers.
        tables: for each table the increments of a curve, of 14 at most, or a list.
    """

    centre: int
    unit: int
    order: int
    tables: tuple[Curve | List, ...]

    def costs(self, codewords: int) -> Ints:
        """Returns int64[T, K], the costs in eighths of a bit; ``_UNUSED`` for a frequency of 0."""
        return _costs(self.tables, self.unit, self.centre, codewords)

    def most_used(self, codewords: int) -> int:
        """Returns the number of codewords with a cost, in the table that has most."""
        return int((self.costs(codewords) < _UNUSED).sum(1).max())

    def frequencies(self, codewords: int, precision: int) -> Ints:
        """Returns int64[T, K], the frequencies of each table, which sum to 2**``precision``.

        Every codeword with a cost gets one slot. The other slots are shared out by the weights 2**-cost: the codewords
        up to each one together get as many as their weights are of all weights, rounded down.

        Raises:
            FormatError: a table has more codewords than slots, or a cost that cannot be.
        """
        costs = self.costs(codewords)
        used = (costs < _UNUSED).astype(np.int64)
        shared = (1 << precision) - used.sum(1, keepdims=True)
        if (shared < 0).any():
            raise FormatError(f"a table of frequencies has more codewords than its {1 << precision} slots")
        sums = np.cumsum(_weights(costs), 1)
        ends: Ints = sums * shared // sums[:, -1:]
        return np.diff(ends, prepend=0, axis=1) + used


@dataclass(frozen=True)
class Curve:
    """A cost that depends on the distance from the centre alone.

    Args:
        increments: those of the cost from distance 0 to 1, on to 2, 4, 8, ...; between, the cost rises evenly. What is
            farther away has the frequency 0.
    """

    increments: tuple[int, ...]

    def bits(self, order: int, codewords: int) -> int:
        """Returns the bits it takes."""
        return 4 + int(golomb_bits(np.array(self.increments, np.int64), order).sum())


@dataclass(frozen=True)
class List:
    """The costs of consecutive codewords; all others have the frequency 0.

    Args:
        below: the number of codewords before the centre.
        above: the number of codewords after it.
        steps: the cost of the centre, then that of each codeword above minus the one before, then of each below.
    """

    below: int
    above: int
    steps: tuple[int, ...]

    def bits(self, order: int, codewords: int) -> int:
        """Returns the bits it takes."""
        ends = 2 * (codewords - 1).bit_length()
        return 4 + ends + int(golomb_bits(_folded(np.array(self.steps, np.int64)), order).sum())


def _costs(tables: Sequence[Curve | List], unit: int, centre: int, codewords: int) -> Ints:
    """Returns int64[T, K], the costs of codewords in eighths of a bit; all curves are computed at once."""
    lengths = np.array([len(table.increments) if isinstance(table, Curve) else 0 for table in tables])
    increments = np.zeros((len(tables), max(1, int(lengths.max()))), np.int64)
    for row, table in zip(increments, tables, strict=True):
        if isinstance(table, Curve):
            row[: len(table.increments)] = table.increments
    distances = np.abs(np.arange(codewords) - centre)
    near = distances <= 1 << int(lengths.max()) >> 1
    costs = np.full((len(tables), codewords), _UNUSED)
    costs[:, near] = _curve_costs(increments, unit, distances[near])
    costs[distances > (1 << lengths >> 1)[:, None]] = _UNUSED
    lists = [(number, table) for number, table in enumerate(tables) if isinstance(table, List)]
    if lists:
        costs[[number for number, _ in lists]] = _list_costs([table for _, table in lists], unit, centre, codewords)
    return costs


def _list_costs(lists: Sequence[List], unit: int, centre: int, codewords: int) -> Ints:
    """Returns int64[T, K], the costs of T lists in eighths of a bit; FormatError for one out of range."""
    steps, listed = np.zeros((len(lists), codewords), np.int64), np.zeros((len(lists), codewords), bool)
    for row, inside, table in zip(steps, listed, lists, strict=True):
        first, end = centre - table.below, centre + table.above + 1
        row[centre:end], row[first:centre] = table.steps[: end - centre], table.steps[end - centre :][::-1]
        inside[first:end] = True
    above, below = np.cumsum(steps[:, centre:], 1), np.cumsum(steps[:, :centre][:, ::-1], 1)[:, ::-1]
    costs, most = np.concatenate([below + steps[:, centre, None], above], 1), _UNUSED >> 3 - unit
    costs[~listed] = most
    if (costs < 0).any() or (costs > most).any() or (costs == most).all(1).any():
        raise FormatError("a table of frequencies has a cost out of range, or none")
    return costs << 3 - unit


def _curve_costs(increments: Ints, unit: int, distances: Ints) -> Ints:
    """Returns int64[T, D], the costs at D distances of T curves with int64[T, n] increments, in eighths of a bit."""
    knots = np.zeros((len(increments), increments.shape[1] + 1), np.int64)
    np.cumsum(increments << 3 - unit, 1, out=knots[:, 1:])
    after = np.frexp(np.maximum(distances - 1, 0))[1] + 1  # the knot that follows: distance 2**(after - 1)
    shift = np.maximum(after - 2, 0)
    along = np.where(after > 1, distances - (1 << shift), distances)
    before = knots[:, after - 1]
    costs: Ints = np.minimum(before + ((knots[:, after] - before) * along >> shift), _MOST)
    return costs


def _weights(costs: Ints) -> Ints:
    return np.where(costs < _UNUSED, _EIGHTHS[costs & 7] << 15 >> (costs >> 3), 0)


# -- writing and reading


def write_tables(tables: CostTables, codewords: int) -> str:
    """Returns tables as text of 0 and 1."""
    width = (codewords - 1).bit_length()
    text = [fixed(tables.centre, width) + fixed(tables.unit, 2) + fixed(tables.order, 2)]
    for table in tables.tables:
        if isinstance(table, Curve):
            text.append(fixed(len(table.increments), 4))
            numbers = table.increments
        else:
            text.append(fixed(_LISTED, 4) + fixed(table.below, width) + fixed(table.above, width))
            numbers = tuple(_folded(np.array(table.steps)).tolist())
        text.extend(golomb(number, tables.order) for number in numbers)
    return "".join(text)


def read_tables(bits: BitReader, count: int, codewords: int) -> CostTables:
    """Reads ``count`` tables of so many codewords, 1 or more.

    Raises:
        FormatError: there are too few bits, or a number is out of range.
    """
    width = (codewords - 1).bit_length()
    centre, unit, order = bits.number(width), bits.number(2), bits.number(2)
    tables: list[Curve | List] = []
    for _ in range(count):
        increments = bits.number(4)
        if increments != _LISTED:
            tables.append(Curve(tuple(bits.golombs(increments, order))))
            continue
        below, above = bits.number(width), bits.number(width)
        if below > centre or centre + above >= codewords:
            raise FormatError("a table of frequencies goes beyond the codewords")
        tables.append(List(below, above, tuple(_unfolded(np.array(bits.golombs(below + above + 1, order))).tolist())))
    if centre >= codewords:
        raise FormatError("the centre of the frequencies is none of the codewords")
    return CostTables(centre, unit, order, tuple(tables))


def _folded(numbers: Ints) -> Ints:
    """Returns 0, 2, 4, ... for 0, 1, 2, ... and 1, 3, ... for -1, -2, ..."""
    return np.where(numbers < 0, -2 * numbers - 1, 2 * numbers)


def _unfolded(numbers: Ints) -> Ints:
    return np.where(numbers & 1, -(numbers + 1 >> 1), numbers >> 1)


# -- choosing


def choose_tables(histograms: Ints) -> tuple[CostTables, int]:
    """Returns tables with about the fewest bytes, and these in bits, the coded indices counted.

    Args:
        histograms: int64[T, K], how often each codeword occurs with each table; not all 0.
    """
    centre = int(np.argmax(histograms.sum(0)))
    each = int(histograms.sum()) // int(np.count_nonzero(histograms))
    return _choose(histograms, centre, 1 + sum(each >= enough for enough in _FINER))


def _choose(histograms: Ints, centre: int, unit: int) -> tuple[CostTables, int]:
    """Returns the tables in units of 2**-``unit`` bit, and their bits and those of the indices."""
    codewords = histograms.shape[1]
    forms = [_fit_lists(histograms, centre, unit), _fit_curves(histograms, centre, unit)]
    coded = [_coded_bits(form, histograms, centre, unit) for form in forms]
    best: tuple[CostTables, int] | None = None
    for order in _ORDERS:
        total, tables = (codewords - 1).bit_length() + 4, []
        for number in range(len(histograms)):
            bits, chosen = min(
                (form[number].bits(order, codewords) + int(bits[number]), which)
                for which, (form, bits) in enumerate(zip(forms, coded, strict=True))
            )
            total += bits
            tables.append(forms[chosen][number])
        if best is None or total < best[1]:
            best = CostTables(centre, unit, order, tuple(tables)), total
    assert best is not None
    return best


def _coded_bits(tables: Sequence[Curve | List], histograms: Ints, centre: int, unit: int) -> Ints:
    """Returns int64[T], the bits of the indices that each table codes."""
    costs = _costs(tables, unit, centre, histograms.shape[1])
    return _bits(costs, histograms, _weights(costs).sum(1))


def _bits(costs: Ints, histograms: Ints, sums: Ints) -> Ints:
    """Returns int64[T], the bits of histograms at costs whose weights have these sums; unused ones must not occur."""
    fixed = ((histograms * costs).sum(1) << FRACTION - 3) + histograms.sum(1) * (fixed_log2(sums) - (31 << FRACTION))
    bits: Ints = -(-fixed >> FRACTION)
    return bits


def _fit_lists(histograms: Ints, centre: int, unit: int) -> list[Curve | List]:
    """Returns for each histogram the list of the costs it has, rounded."""
    lengths = fixed_log2(np.maximum(histograms, 1))
    costs = lengths.max(1, keepdims=True) - lengths + (1 << FRACTION - unit - 1) >> FRACTION - unit
    costs = np.where(histograms > 0, np.minimum(costs, _MOST >> 3 - unit), _UNUSED >> 3 - unit)
    lists: list[Curve | List] = []
    for row, histogram in zip(costs, histograms, strict=True):
        used = np.flatnonzero(histogram)
        if not len(used):
            lists.append(Curve(()))
            continue
        first, last = min(int(used[0]), centre), max(int(used[-1]), centre)
        above, below = row[centre : last + 1], row[first : centre + 1][::-1]
        steps = np.concatenate([above[:1], np.diff(above), np.diff(below)])
        lists.append(List(centre - first, last - centre, tuple(steps.tolist())))
    return lists


def _fit_curves(histograms: Ints, centre: int, unit: int) -> list[Curve | List]:
    """Returns for each histogram about the curve of the fewest bits.

    The increments begin with the densities around the knots, and are then changed by a unit wherever that saves bits.
    """
    codewords = histograms.shape[1]
    distances = np.arange(max(centre, codewords - 1 - centre) + 1)
    places = np.bincount(np.abs(np.arange(codewords) - centre))
    folded = np.zeros((len(histograms), len(distances)), np.int64)
    np.add.at(folded.T, np.abs(np.arange(codewords) - centre), histograms.T)
    used = folded > 0
    farthest = np.where(used.any(1), len(distances) - 1 - np.argmax(used[:, ::-1], 1), 0)
    lengths = np.where(farthest > 0, np.frexp(np.maximum(farthest - 1, 0))[1] + 1, 0)
    widest = int(lengths.max())
    if widest >= _LISTED:
        return _fit_lists(histograms, centre, unit)
    if widest == 0:
        return [Curve(())] * len(histograms)
    distances = distances[: (1 << widest >> 1) + 1]
    folded, places = folded[:, : len(distances)], places[: len(distances)]
    within = distances <= (1 << lengths >> 1)[:, None]
    fit = _Fit(folded, np.where(within, places, 0), distances, unit)
    increments = fit.improved(fit.start(widest))
    return [Curve(tuple(row[:length].tolist())) for row, length in zip(increments, lengths, strict=True)]


@dataclass(frozen=True)
class _Fit:
    """The fit of T curves to the counts at D distances.

    Args:
        counts: int64[T, D].
        places: int64[T, D], the number of codewords at each distance that a curve gives a cost.
        distances: int64[D].
        unit: q.
    """

    counts: Ints
    places: Ints
    distances: Ints
    unit: int

    def start(self, increments: int) -> Ints:
        """Returns int64[T, n] increments by the mean counts around the knots, which are at 0, 1, 2, 4, ..."""
        knots = [0, *(1 << knot for knot in range(increments))]
        ends = [(0, 1), (1, 2), (2, 3), *((3 * knot // 4, 3 * knot // 2) for knot in knots[3:])][: len(knots)]
        counts = np.stack([self.counts[:, first:end].sum(1) for first, end in ends], 1)
        places = np.stack([self.places[:, first:end].sum(1) for first, end in ends], 1)
        density = fixed_log2(2 * counts + 1) - fixed_log2(np.maximum(2 * places, 1))
        rise = density[:, :-1] - density[:, 1:] + (1 << FRACTION - self.unit - 1) >> FRACTION - self.unit
        increments_of_knots: Ints = np.maximum(rise, 0)
        return increments_of_knots

    def improved(self, increments: Ints) -> Ints:
        """Returns increments of which each, in each round, was changed by a unit where that takes fewer bits."""
        least = self._bits(increments)
        for _ in range(_ROUNDS):
            for column in range(increments.shape[1]):
                for step in (1, -1):
                    trial = increments.copy()
                    trial[:, column] = np.maximum(trial[:, column] + step, 0)
                    bits = self._bits(trial)
                    increments = np.where((bits < least)[:, None], trial, increments)
                    least = np.minimum(bits, least)
        return increments

    def _bits(self, increments: Ints) -> Ints:
        costs = _curve_costs(increments, self.unit, self.distances)
        return _bits(costs, self.counts, (_weights(costs) * self.places).sum(1))
