"""Frequency tables written as costs: what each codeword takes, in fractions of a bit, which few bits say.

A table lists the costs one by one, or gives a curve over the distance from one codeword, the centre: small tensors then
pay for a handful of numbers, whatever their codewords. Costs say nothing of the precision of the coder, and all of it
is integer arithmetic, so that the same counts give the same bytes on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from compressor.formats.codecs.bit_text import BitReader, fixed, golomb, golomb_bits
from compressor.formats.codecs.frequencies import FRACTION, fixed_log2
from compressor.formats.errors import FormatError

__all__ = ["CostTables", "choose_tables", "frequencies_of", "read_tables", "write_tables"]

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
        return _costs([(self, codewords)])

    def most_used(self, codewords: int) -> int:
        """Returns the number of codewords with a cost, in the table that has most."""
        return int((self.costs(codewords) < _UNUSED).sum(1).max())

    def frequencies(self, codewords: int, precision: int) -> Ints:
        """Returns int64[T, K], the frequencies of each table; see ``frequencies_of``."""
        return frequencies_of([(self, codewords)], precision)


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

    def costs(self, unit: int) -> list[int]:
        """Returns the costs from the first codeword to the last in eighths of a bit; FormatError for one out of range.

        Args:
            unit: q.
        """
        centre, above, below = self.steps[0], self.steps[: self.above + 1], self.steps[self.above + 1 :]
        costs = [*[*accumulate((centre, *below))][:0:-1], *accumulate(above)]
        most = _UNUSED >> 3 - unit
        if min(costs) < 0 or max(costs) > most or min(costs) == most:
            raise FormatError("a table of frequencies has a cost out of range, or none")
        return [cost << 3 - unit for cost in costs]


def frequencies_of(parts: Sequence[tuple[CostTables, int]], precision: int) -> Ints:
    """Returns the frequencies of all tables of some parts, one table below the other, which sum to 2**``precision``.

    Every codeword with a cost gets one slot. The other slots are shared out by the weights 2**-cost: the codewords up
    to each one together get as many as their weights are of all weights, rounded down.

    Args:
        parts: tables, each with the number of their codewords.
        precision: P.

    Returns:
        int64[T, K] for T tables of all parts and the largest number K; codewords beyond those of a part get 0.

    Raises:
        FormatError: a table has more codewords than slots, or a cost that cannot be.
    """
    costs = _costs(parts)
    used = costs < _UNUSED
    shared = (1 << precision) - used.sum(1, keepdims=True)
    if shared.min() < 0:
        raise FormatError(f"a table of frequencies has more codewords than its {1 << precision} slots")
    sums = np.cumsum(_WEIGHTS[costs], 1)
    ends = sums * shared // sums[:, -1:]
    frequencies: Ints = ends + used
    frequencies[:, 1:] -= ends[:, :-1]
    return frequencies


def _costs(parts: Sequence[tuple[CostTables, int]]) -> Ints:
    """Returns int64[T, K], the costs of codewords in eighths of a bit, of all tables of some parts at once."""
    tables = [table for part, _ in parts for table in part.tables]
    numbers = np.array([(part.unit, part.centre, count) for part, count in parts for _ in part.tables])
    units, centres, counts = numbers[:, :1], numbers[:, 1:2], numbers[:, 2:]
    codewords = np.arange(max(count for _, count in parts))
    by_distance = _curve_costs(_increments(tables), units, len(codewords))
    reach = [1 << len(table.increments) >> 1 if isinstance(table, Curve) else 0 for table in tables]
    by_distance[codewords > np.array(reach)[:, None]] = _UNUSED
    costs: Ints = by_distance[np.arange(len(tables))[:, None], np.abs(codewords - centres)]
    costs[codewords >= counts] = _UNUSED
    for row, table, (unit, centre, _) in zip(costs, tables, numbers.tolist(), strict=True):
        if isinstance(table, List):
            row[centre - table.below : centre + table.above + 1] = table.costs(unit)
    return costs


def _increments(tables: Sequence[Curve | List]) -> Ints:
    """Returns int64[T, n], the increments of curves; zeros behind them, and for lists."""
    rows = [table.increments if isinstance(table, Curve) else () for table in tables]
    most = max(1, *map(len, rows))
    return np.array([row + (0,) * (most - len(row)) for row in rows], np.int64)


_DISTANCES = np.arange(1 << 14)  # all that there are between codewords
_AFTER = np.frexp(np.maximum(_DISTANCES - 1, 0))[1].astype(np.int64) + 1  # the knot that follows, at 2**(this - 1)
_SHIFT = np.maximum(_AFTER - 2, 0)  # log2 of the distance between that knot and the one before
_ALONG = np.where(_AFTER > 1, _DISTANCES - (1 << _SHIFT), _DISTANCES)  # the distance from the one before


def _curve_costs(increments: Ints, units: Ints | int, distances: int) -> Ints:
    """Returns the costs of curves in eighths of a bit, int64[T, distances]: at the distances 0, 1, 2, ...

    Args:
        increments: int64[T, n] of T curves; beyond the last knot the cost stays the same.
        units: q of each, int64[T, 1], or of all.
        distances: how many.
    """
    knots = np.zeros((len(increments), increments.shape[1] + 1), np.int64)
    np.cumsum(increments << 3 - units, 1, out=knots[:, 1:])
    after = _AFTER[:distances]
    before = knots.take(after - 1, 1, mode="clip")
    rise = knots.take(after, 1, mode="clip") - before
    costs: Ints = np.minimum(before + (rise * _ALONG[:distances] >> _SHIFT[:distances]), _MOST)
    return costs


_WEIGHTS = np.append(_EIGHTHS[np.arange(_UNUSED) & 7] << 15 >> (np.arange(_UNUSED) >> 3), 0)  # of each cost


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
        tables.append(List(below, above, tuple(map(_unfolded, bits.golombs(below + above + 1, order)))))
    if centre >= codewords:
        raise FormatError("the centre of the frequencies is none of the codewords")
    return CostTables(centre, unit, order, tuple(tables))


def _folded(numbers: Ints) -> Ints:
    """Returns 0, 2, 4, ... for 0, 1, 2, ... and 1, 3, ... for -1, -2, ..."""
    return np.where(numbers < 0, -2 * numbers - 1, 2 * numbers)


def _unfolded(number: int) -> int:
    return -(number + 1 >> 1) if number & 1 else number >> 1


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
    costs = CostTables(centre, unit, 0, tuple(tables)).costs(histograms.shape[1])
    return _bits(costs, histograms, _WEIGHTS[costs].sum(1))


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
    fit = _Fit(folded, np.where(within, places, 0), unit)
    increments = fit.improved(fit.start(widest))
    return [Curve(tuple(row[:length].tolist())) for row, length in zip(increments, lengths, strict=True)]


@dataclass(frozen=True)
class _Fit:
    """The fit of T curves to the counts at D distances.

    Args:
        counts: int64[T, D].
        places: int64[T, D], the number of codewords at each distance that a curve gives a cost.
        unit: q.
    """

    counts: Ints
    places: Ints
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
        costs = _curve_costs(increments, self.unit, self.counts.shape[1])
        return _bits(costs, self.counts, (_WEIGHTS[costs] * self.places).sum(1))
