"""The choice of classes: rows, columns and positions of a tensor whose indices are alike in size share a class.

The table of an index has the number of its row's class, plus its column's, plus its position's: the spread of an index
is taken for a product of three factors. Classes are logarithms of mean magnitude, in common steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressor.formats.codecs.frequencies import FRACTION, fixed_log2

__all__ = ["MAX_TABLES", "Classes", "choose_classes"]

Ints = NDArray[np.int64]

MAX_TABLES = 32
"""The most tables of a tensor."""

_STEPS = tuple(int(step * (1 << FRACTION)) for step in (2, 1, 0.5, 0.25))  # ratios of magnitudes 4, 2, 1.41 and 1.19
_SAMPLE = 1 << 18  # indices other than the most frequent one; of more, a part decides
_COARSE = 12  # bits after the point of code lengths that float64 sums exactly


@dataclass(frozen=True)
class Classes:
    """The class of each row, column and position.

    Args:
        tables: the number T of tables; classes are below it.
        axes: the classes of rows, columns and positions, whole numbers.
    """

    tables: int
    axes: tuple[Ints, Ints, Ints]

    @classmethod
    def none(cls, sizes: tuple[int, int, int]) -> Classes:
        """Returns one class for all rows, all columns and all positions."""
        return cls(1, (np.zeros(sizes[0], np.int64), np.zeros(sizes[1], np.int64), np.zeros(sizes[2], np.int64)))

    def choices(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Returns uint8[stop - start], the tables of the indices at these places: sums of classes, T - 1 at most."""
        rows, columns, positions = self.axes
        length = len(columns) * len(positions)
        if length > stop - start:  # not all of such long rows is asked for
            numbers, inner = np.divmod(np.arange(start, stop), length)
            column, position = np.divmod(inner, len(positions))
            long_sums = rows[numbers] + columns[column] + positions[position]
            chosen: NDArray[np.uint8] = np.minimum(long_sums, self.tables - 1).astype(np.uint8)
            return chosen
        first, last = start // length, -(-stop // length)
        row = (columns[:, None] + positions).reshape(-1).astype(np.uint8)
        sums: NDArray[np.uint8] = rows[first:last, None].astype(np.uint8) + row  # of three classes at most 93
        np.minimum(sums, np.uint8(self.tables - 1), out=sums)
        return sums.reshape(-1)[start - first * length : stop - first * length]

    def counts(self, axes: tuple[int, ...] = (0, 1, 2)) -> Ints:
        """Returns int64[T], how many sums of the classes of some axes are 0, 1, ... and T - 1 or more."""
        counts = np.ones(1, np.int64)
        for axis in axes:
            counts = np.convolve(counts, np.bincount(self.axes[axis], minlength=self.tables))
        counts = np.pad(counts, (0, self.tables))
        return np.append(counts[: self.tables - 1], counts[self.tables - 1 :].sum())


def choose_classes(indices: NDArray[Any], sizes: tuple[int, int, int], codewords: int) -> Classes:
    """Returns about the classes with which indices, classes and tables take the fewest bits.

    Each axis alone is tried, then all sets of those that gain alone, in a few steps of magnitude. Of the best, every
    class is then chosen anew, once.

    Args:
        indices: uint[n], with n above 0.
        sizes: the numbers of rows, columns and positions, whose product is n.
        codewords: the number K of codewords.
    """
    view = _View(indices, sizes, codewords)
    none = Classes.none(sizes)
    least = view.bits(none)
    alone = {axis: best for axis in range(3) if (best := view.stepped((axis,)))}
    gaining = [axis for axis, (bits, _) in alone.items() if bits < least]
    found = [best for axes in _sets(gaining) if (best := view.stepped(axes))]
    bits, classes = min([(least, none), *alone.values(), *found], key=lambda choice: choice[0])
    if classes is none:
        return none
    refined = view.refined(classes)
    return refined if view.bits(refined) < bits else classes


def _sets(axes: list[int]) -> Iterator[tuple[int, ...]]:
    """Returns all sets of two or three axes."""
    return chain(combinations(axes, 2), combinations(axes, 3))


class _View:
    """Indices that are not the most frequent one, or a part of them, with the places where they stand."""

    def __init__(self, indices: NDArray[Any], sizes: tuple[int, int, int], codewords: int) -> None:
        self._sizes, self._codewords = sizes, codewords
        self._common = int(np.argmax(np.bincount(indices, minlength=codewords)))
        places = np.flatnonzero(indices != self._common)
        self._each = max(1, -(-len(places) // _SAMPLE))  # how many each stands for
        places = places[:: self._each]
        self._values = indices[places].astype(np.int64)
        rows, inner = np.divmod(places, sizes[1] * sizes[2])
        self._at = rows, *np.divmod(inner, sizes[2])
        magnitudes = np.abs(self._values - self._common)
        self._sums = [
            np.bincount(at, magnitudes, size).astype(np.int64) for at, size in zip(self._at, sizes, strict=True)
        ]

    def stepped(self, axes: tuple[int, ...]) -> tuple[int, Classes] | None:
        """Returns the best classes of some axes in equal steps of magnitude, and their bits; None for one class."""
        found = [(self.bits(classes), classes) for classes in self._each_step(axes) if classes.tables > 1]
        return min(found, key=lambda choice: choice[0], default=None)

    def _each_step(self, axes: tuple[int, ...]) -> Iterator[Classes]:
        for step in _STEPS:
            classes = list(Classes.none(self._sizes).axes)
            highest = 0
            for axis in axes:
                sums = self._sums[axis]
                logarithms = fixed_log2(np.maximum(sums, 1))
                classes[axis] = (logarithms.max() - logarithms + step // 2) // step
                highest += int(classes[axis].max(where=sums > 0, initial=0))
                classes[axis][sums == 0] = MAX_TABLES  # a table of their own, whatever else the sum has
            tables = min(highest + 1 + any((found == MAX_TABLES).any() for found in classes), MAX_TABLES)
            rows, columns, positions = (np.minimum(found, tables - 1) for found in classes)
            yield Classes(tables, (rows, columns, positions))

    def _sum(self, classes: Classes, axes: tuple[int, ...]) -> Ints:
        """Returns for each index of the view the sum of the classes of some axes, T - 1 at most."""
        sums = np.zeros(len(self._values), np.int64)
        for axis in axes:
            sums += classes.axes[axis][self._at[axis]]
        return np.minimum(sums, classes.tables - 1)

    def _histograms(self, classes: Classes) -> Ints:
        """Returns int64[T, K], about how often each codeword occurs with each table."""
        codes = self._sum(classes, (0, 1, 2)) * self._codewords + self._values
        counts = np.bincount(codes, minlength=classes.tables * self._codewords).reshape(classes.tables, -1)
        counts *= self._each
        counts[:, self._common] = np.maximum(classes.counts() - counts.sum(1), 0)
        return counts

    def bits(self, classes: Classes) -> int:
        """Returns about the bits of indices, classes and tables."""
        counts = self._histograms(classes)
        bits = _entropy_bits(counts) + int(self._table_bits(counts).sum())
        for axis in classes.axes if classes.tables > 1 else ():
            used = np.bincount(axis)
            bits += _entropy_bits(used[None]) + 5 * int(np.count_nonzero(used)) + 6
        return bits

    def _table_bits(self, counts: Ints) -> Ints:
        """Returns int64[T], about the bits of each table: of a list, or of a curve and what it fits worse."""
        used = counts > 0
        number = used.sum(1)
        first, last = np.argmax(used, 1), self._codewords - 1 - np.argmax(used[:, ::-1], 1)
        farthest = np.maximum(np.abs(first - self._common), np.abs(last - self._common))
        curve = 3 * number // 4 + 6 * (np.frexp(farthest)[1] + 1)
        return np.where(number > 1, 4 + np.minimum(5 * (last - first + 1) + 2 * self._codewords.bit_length(), curve), 4)

    def refined(self, classes: Classes) -> Classes:
        """Returns classes of which each is the one that codes its row, column or position in the fewest bits."""
        for axis in range(3):
            if not classes.axes[axis].any():
                continue
            costs = self._costs(classes, axis)
            axes = list(classes.axes)
            axes[axis] = np.argmin(costs, 1)
            classes = Classes(classes.tables, (axes[0], axes[1], axes[2]))
        return classes

    def _costs(self, classes: Classes, axis: int) -> NDArray[np.float64]:
        """Returns float64[size, T], whole numbers: what each row, column or position takes in each class."""
        counts, tables = self._histograms(classes), classes.tables
        lengths = _lengths(counts)
        more = (lengths - lengths[:, self._common, None]) * self._each
        others = tuple(other for other in range(3) if other != axis)
        sums, cells = self._sum(classes, others), classes.counts(others)
        own: Ints = _lengths(np.bincount(classes.axes[axis], minlength=tables)[None])[0]
        costs = np.empty((self._sizes[axis], tables))
        for choice in range(tables):
            chosen = np.minimum(sums + choice, tables - 1)
            common = int(cells @ lengths[np.minimum(np.arange(tables) + choice, tables - 1), self._common])
            costs[:, choice] = np.bincount(self._at[axis], more[chosen, self._values], self._sizes[axis])
            costs[:, choice] += common + int(own[choice])
        return costs


def _entropy_bits(counts: Ints) -> int:
    """Returns the bits of symbols that occur so often, each row coded for itself."""
    totals = counts.sum(1)
    fixed = (totals * fixed_log2(np.maximum(totals, 1))).sum() - (counts * fixed_log2(np.maximum(counts, 1))).sum()
    return int(fixed >> FRACTION)


def _lengths(counts: Ints) -> Ints:
    """Returns code lengths in units of 2**-_COARSE bit; what does not occur counts as a part of one."""
    seen = 32 * counts + 1
    return fixed_log2(seen.sum(1, keepdims=True)) - fixed_log2(seen) >> FRACTION - _COARSE
