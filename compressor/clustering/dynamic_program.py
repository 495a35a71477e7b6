"""The dynamic programme that cuts sorted weights into runs of least squared error, exact or nearly so.

All sums are float64 prefix sums over sorted data, so the same weights give the same runs on any machine and any
number of threads.
"""

from __future__ import annotations

import copy

import numpy as np
from numpy.typing import NDArray

__all__ = ["PrefixSums", "initial_borders", "refined"]

MIN_EDGES, EDGES_PER_CODEWORD, MAX_EDGES = 2_048, 32, 8_192  # candidate cluster borders of the dynamic programme
MAX_CODEWORDS_PROGRAMMED, MAX_PASSES = 256, 100
WINDOW = 16  # candidates on either side of a border that is refined
SAMPLED, SAMPLED_ENDS = 32_768, 512  # order statistics looked at, and all of so many at either end


class PrefixSums:
    """Mass, first and second moment of every run of the sorted values."""

    def __init__(self, values: NDArray[np.float64], mass: NDArray[np.float64]) -> None:
        self.centre = float(values.mean())
        shifted = values - self.centre  # or the squares cancel when the spread is small beside the mean
        self.mass, self.first, self.second = (
            np.concatenate([[0.0], np.cumsum(mass * shifted**power)]) for power in (0, 1, 2)
        )

    def means(self, borders: NDArray[np.int64]) -> NDArray[np.float64]:
        """Mean of each run between neighbouring borders; empty runs are dropped."""
        borders = np.unique(borders)
        mean: NDArray[np.float64] = np.diff(self.first[borders]) / np.diff(self.mass[borders]) + self.centre
        return mean

    def at(self, edges: NDArray[np.int64]) -> PrefixSums:
        """Keep the sums at some positions only, which are numbered from 0."""
        kept = copy.copy(self)
        kept.mass, kept.first, kept.second = self.mass[edges], self.first[edges], self.second[edges]
        return kept

    def run_costs(self, begins: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.float64]:
        """Squared error of every run begins[i]..ends[i] about its mean, broadcast; inf unless begins < ends."""
        mass, first, second = (s[ends] - s[begins] for s in (self.mass, self.first, self.second))
        with np.errstate(divide="ignore", invalid="ignore"):
            cost = np.maximum(second - first * first / mass, 0)
        return np.where(mass > 0, cost, np.inf)


def initial_borders(values: NDArray[np.float64], sums: PrefixSums, codewords: int) -> NDArray[np.int64]:
    """Find the best borders among candidates, by one row of the dynamic programme for each cluster."""
    count = len(values)
    if codewords > MAX_CODEWORDS_PROGRAMMED:
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
    """Give the least error of the runs that end at each edge in so many clusters, and where their last begins.

    Beginnings grow with ends, so those found for every second end bound the search for the ends between:
    O(E log E), every grid of ends at once.

    Args:
        best: float64[E], the same with one cluster fewer.
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
    """Choose at most so many positions in the sorted values at which clusters may end, 0 and n among them.

    The best codewords lie as densely as the cube root of the values' density; of what IEEE arithmetic gives alike
    on all machines its square root comes nearest. Some lie by rank and some by value, for the odd shapes.
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


def refined(sums: PrefixSums, borders: NDArray[np.int64]) -> NDArray[np.int64]:
    """Move all borders together to where the error is least, within a window about each, on ever finer grids.

    O(K * (2 * WINDOW + 1)^2) for each of the about log2(n) grids.
    """
    count = len(sums.mass) - 1
    stride = max(1, count // MAX_EDGES)
    for _ in range(MAX_PASSES):
        windows = np.clip(borders[:, None] + stride * np.arange(-WINDOW, WINDOW + 1), 0, count)
        windows[[0, -1]] = borders[[0, -1], None]  # the first and the last stay
        moved = _best_through(windows, sums.run_costs(windows[:-1, :, None], windows[1:, None, :]))
        if np.array_equal(moved, borders):
            if stride == 1:
                break
            stride //= 2
        borders = moved
    return borders


def _best_through(windows: NDArray[np.int64], costs: NDArray[np.float64]) -> NDArray[np.int64]:
    """Choose one position from each of K + 1 windows, [K + 1, W], by the cost of each step, [K, W, W]."""
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
