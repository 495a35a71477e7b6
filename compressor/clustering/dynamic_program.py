"""The dynamic program that cuts sorted weights into clusters of least squared error, exactly or nearly so.

All sums are float64 prefix sums over sorted data, so the same weights give the same clusters on any machine and with
any number of threads.
"""

from __future__ import annotations

import copy

import numpy as np
from numpy.typing import NDArray

__all__ = ["PrefixSums", "initial_borders", "refine_borders"]

MIN_EDGES, EDGES_PER_CODEWORD, MAX_EDGES = 2_048, 32, 8_192  # candidate cluster borders of the dynamic program
MAX_PROGRAM_CODEWORDS, MAX_PASSES = 256, 100
WINDOW = 16  # candidates on either side of a border that is refined
SAMPLED, SAMPLED_ENDS = 32_768, 512  # sampled order statistics; the outermost ones at either end are all taken


class PrefixSums:
    """Prefix sums of mass, first and second moment of sorted values, from which the error of any cluster follows.

    Args:
        values: float64[n], ascending.
        mass: float64[n], the importance of each value; None: 1.
    """

    def __init__(self, values: NDArray[np.float64], mass: NDArray[np.float64] | None = None) -> None:
        self.centre = float(values.mean())
        # In place, for a layer may be as large as all others together.
        self.mass = None if mass is None else np.concatenate([[0.0], mass])
        self.first, self.second = np.zeros(len(values) + 1), np.zeros(len(values) + 1)
        np.subtract(values, self.centre, out=self.first[1:])  # against cancellation where the mean is beside the spread
        np.multiply(self.first, self.first, out=self.second)
        sums = [self.first, self.second]
        if self.mass is not None:
            self.first *= self.mass
            self.second *= self.mass
            sums.append(self.mass)
        for total in sums:
            np.cumsum(total, out=total)

    def means(self, borders: NDArray[np.int64]) -> NDArray[np.float64]:
        """Returns the mean of each cluster between neighbouring borders; empty clusters are dropped."""
        borders = np.unique(borders)
        mean: NDArray[np.float64] = np.diff(self.first[borders]) / np.diff(self._mass_at(borders)) + self.centre
        return mean

    def at(self, edges: NDArray[np.int64]) -> PrefixSums:
        """Returns the prefix sums at the positions ``edges`` alone, which are numbered from 0."""
        chosen = copy.copy(self)
        chosen.mass, chosen.first, chosen.second = self._mass_at(edges), self.first[edges], self.second[edges]
        return chosen

    def _mass_at(self, edges: NDArray[np.int64]) -> NDArray[np.float64]:
        """Returns the sum of the mass below each edge, which is its position where all have mass 1."""
        return edges.astype(np.float64) if self.mass is None else self.mass[edges]

    def run_costs(self, begins: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.float64]:
        """Returns the squared error of each cluster begins[i]..ends[i] about its mean, broadcast; inf if empty."""
        mass = self._mass_at(ends) - self._mass_at(begins)
        first, second = (total[ends] - total[begins] for total in (self.first, self.second))
        with np.errstate(divide="ignore", invalid="ignore"):
            cost = np.maximum(second - first * first / mass, 0)
        return np.where(mass > 0, cost, np.inf)


def initial_borders(values: NDArray[np.float64], sums: PrefixSums, codewords: int) -> NDArray[np.int64]:
    """Finds the best cluster borders among candidate positions, with one row of the dynamic program for each cluster.

    Args:
        values: float64[n], ascending.
        sums: the prefix sums of ``values``.
        codewords: K, the number of clusters; above 256 the clusters are of equal size, without a search.

    Returns:
        int64[K' + 1], ascending, from 0 to n, K' <= K.
    """
    count = len(values)
    if codewords > MAX_PROGRAM_CODEWORDS:
        return np.linspace(0, count, codewords + 1).astype(np.int64)
    edges = _candidate_edges(values, min(MIN_EDGES + EDGES_PER_CODEWORD * codewords, MAX_EDGES))
    sums = sums.at(edges)
    best, choices = sums.run_costs(np.zeros(len(edges), np.int64), np.arange(len(edges))), []
    for clusters in range(2, min(codewords, len(edges) - 1) + 1):
        best, choice = _next_row(sums, best, clusters)
        choices.append(choice)
    borders = [len(edges) - 1]
    for choice in reversed(choices):
        borders.append(int(choice[borders[-1]]))
    return edges[[0, *reversed(borders)]]


def _next_row(
    sums: PrefixSums, best: NDArray[np.float64], clusters: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Returns the least error of the clusters that end at each edge, and where the last of them begins.

    The best beginning grows with the end, so the beginnings found for every second end bound the search for the ends
    between them: O(E log E) for E edges, with all ends of one stride computed at once.

    Args:
        best: float64[E], the least error with one cluster fewer.
        clusters: the number of clusters of this row.
    """
    edges = len(best)
    row, begins = np.full(edges, np.inf), np.full(edges, clusters - 1)
    stride = 1 << (edges - clusters).bit_length() - 1
    while stride:
        ends = np.arange(clusters - 1 + stride, edges, 2 * stride)
        after = ends + stride
        low = begins[ends - stride]
        high = np.minimum(np.where(after < edges, begins[np.minimum(after, edges - 1)], edges), ends - 1)
        lengths = high - low + 1
        starts = np.cumsum(lengths) - lengths
        tried = np.arange(lengths.sum()) - np.repeat(starts - low, lengths)
        totals = best[tried] + sums.run_costs(tried, np.repeat(ends, lengths))
        row[ends] = np.minimum.reduceat(totals, starts)
        least = np.flatnonzero(totals == np.repeat(row[ends], lengths))
        begins[ends] = tried[least[np.searchsorted(least, starts)]]
        stride //= 2
    return row, begins


def _candidate_edges(values: NDArray[np.float64], most: int) -> NDArray[np.int64]:
    """Returns at most ``most`` positions in the sorted values at which clusters may end, 0 and n among them.

    The density of the best codewords is the cube root of the density of the values. The square root is the nearest to
    it that IEEE arithmetic computes alike on all machines. Some positions are spaced evenly by rank and some by value,
    for distributions of unusual shape.
    """
    count = len(values)
    if count < most:
        return np.arange(count + 1)
    ends = min(SAMPLED_ENDS, count)
    inside = np.linspace(0, count - 1, SAMPLED).astype(np.int64)
    ranks = np.unique(np.concatenate([np.arange(ends), inside, np.arange(count - ends, count)]))
    spacing = np.sqrt(np.diff(ranks) * np.diff(values[ranks]))
    grown = np.concatenate([[0.0], np.cumsum(spacing)])
    by_density = ranks[np.searchsorted(grown, np.linspace(0, grown[-1], most // 2))]
    by_rank = np.linspace(0, count, most // 4 + 1).astype(np.int64)
    by_value = np.searchsorted(values, np.linspace(values[0], values[-1], most // 4))
    return np.unique(np.concatenate([by_density, by_rank, by_value]))


def refine_borders(sums: PrefixSums, borders: NDArray[np.int64]) -> NDArray[np.int64]:
    """Moves all borders together to where the error is least, within a window about each, on ever finer grids.

    It costs O(K * (2 * WINDOW + 1)^2) for each of the about log2(n) grids.

    Args:
        sums: the prefix sums of the sorted values.
        borders: int64[K + 1], ascending; the first and the last stay.

    Returns:
        int64[K + 1].
    """
    count = len(sums.first) - 1
    stride = max(1, count // MAX_EDGES)
    for _ in range(MAX_PASSES):
        windows = np.clip(borders[:, None] + stride * np.arange(-WINDOW, WINDOW + 1), 0, count)
        windows[[0, -1]] = borders[[0, -1], None]
        moved = _best_through(windows, sums.run_costs(windows[:-1, :, None], windows[1:, None, :]))
        if np.array_equal(moved, borders):
            if stride == 1:
                break
            stride //= 2
        borders = moved
    return borders


def _best_through(windows: NDArray[np.int64], costs: NDArray[np.float64]) -> NDArray[np.int64]:
    """Chooses one position from each of K + 1 windows, [K + 1, W], with the least sum of step costs, [K, W, W]."""
    best, choices = np.zeros(windows.shape[1]), []
    for cost in costs:
        total = best[:, None] + cost
        choices.append(total.argmin(axis=0))
        best = total.min(axis=0)
    place = int(best.argmin())
    path = [int(windows[-1, place])]
    for choice, window in zip(reversed(choices), windows[-2::-1], strict=True):
        place = int(choice[place])
        path.append(int(window[place]))
    return np.array(path[::-1], dtype=np.int64)
