"""Weight fixing: clusters of weights within a relative distance of a sum of a few powers of two.

The weights are sorted once. Those within a relative distance of a codeword then form a window of the sorted array, so
a cluster costs little more than reading its weights, and no table of weights by codewords is ever built.

Reference: Subia-Waud, Dasmahapatra, "Weight Fixing Networks", ECCV 2022.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from compressor.clustering.sorted_runs import SortedRuns, sort_order

__all__ = ["candidates", "fix", "nearest_window"]

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.integer[Any]]

MAX_ORDER = 20  # more terms than this add no precision, so the tolerance is doubled instead
CHUNK, MAX_CHUNK = 256, 1 << 20  # weights read at a time on each side of a codeword


def candidates(largest: float, smallest: float, tolerance: float, order: int) -> NDArray[np.float64]:
    """Returns the values that weights may be fixed to: a geometric grid of sums of at most ``order + 1`` powers of two.

    The ratio of neighbouring grid values is ``(1 + tolerance) / (1 - tolerance)``, so every weight between them is
    within the relative tolerance of one of them; rounding to few powers of two then moves the grid values.

    Args:
        largest: the largest magnitude of the weights; the grid ends below it.
        smallest: where the grid starts, above 0, rounded down to a power of two.
        tolerance: relative distance, 0 to 1.
        order: how many powers of two may be added to the first.

    Returns:
        float64, ascending, with 0 and the negatives of all values.

    Example:
        >>> candidates(1.0, 0.25, tolerance=0.2, order=0).tolist()
        [-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0]
        >>> len(candidates(1.0, 2**-7, tolerance=0.01, order=2))
        337
    """
    lowest = int(np.frexp(smallest)[1]) - 1
    targets = _geometric(2.0**lowest, largest, (1 + tolerance) / (1 - tolerance))
    rounded = _power_of_two(targets, lowest - order - 1)
    for _ in range(order):
        residual = targets - rounded
        missing = np.abs(residual) >= tolerance * targets
        rounded[missing] += _power_of_two(residual[missing], lowest - order - 1)
    return np.unique(np.concatenate([-rounded, [0.0], rounded]))


def _geometric(first: float, largest: float, ratio: float) -> NDArray[np.float64]:
    """Returns ``first * ratio^j`` while below ``largest``, but ``first`` in any case.

    The values are products, not powers, because multiplication rounds alike on all machines.
    """
    factors = np.full(max(0, int(np.log(largest / first) / np.log(ratio))) + 2, ratio)
    factors[0] = first
    targets = np.multiply.accumulate(factors)
    kept: NDArray[np.float64] = targets[: max(1, int(np.searchsorted(targets, largest)))]
    return kept


def _power_of_two(values: NDArray[np.float64], lowest: int) -> NDArray[np.float64]:
    """Rounds to signed powers of two, nearest in the logarithm, no smaller than ``2^lowest``."""
    mantissa, exponent = np.frexp(np.abs(values))
    exponent = np.maximum(exponent - (mantissa < np.sqrt(0.5)), lowest)
    rounded: NDArray[np.float64] = np.copysign(np.ldexp(1.0, exponent), values)
    return rounded


def nearest_window(remaining: SortedRuns, codeword: float, tolerance: float, wanted: int) -> tuple[int, int]:
    """Finds the most weights, nearest first, whose mean relative distance ``|w - c| / |w|`` is within the tolerance.

    Distances of 0 do not count in the mean. The weights on both sides of the codeword are read outwards in growing
    chunks and merged by distance, so the cost is proportional to the weights taken and the sums lose no digits.

    Args:
        remaining: the weights to choose from.
        codeword: c, not 0, a float32 value.
        tolerance: largest mean relative distance.
        wanted: the most weights to take.

    Returns:
        The ranks (first, last) of a window of the remaining weights, ``last`` not included; empty if even the nearest
        weight is too far.
    """
    # Divergence from the paper: only weights of the codeword's sign are considered; for others the paper's distance is
    # above 1.
    edges = np.searchsorted(remaining.values, np.array([0, codeword], dtype=np.float32))
    zero, middle = remaining.rank(edges).tolist()
    low, high = (zero, len(remaining)) if codeword > 0 else (0, zero)
    first = last = middle
    total, counted = 0.0, 0
    while last - first < wanted:
        chunk = min(max(CHUNK, last - first), MAX_CHUNK)
        below = _distances(remaining.between(max(low, first - chunk), first), codeword)[::-1]
        above = _distances(remaining.between(last, min(high, last + chunk)), codeword)
        reach = min(below[-1] if first - chunk > low else np.inf, above[-1] if last + chunk < high else np.inf)
        distance, is_below = _merged(below, above, reach)
        sums, counts = total + np.cumsum(distance), counted + np.cumsum(distance > 0)
        fits = sums <= tolerance * counts  # monotone, because the mean of ascending distances never falls
        accepted = min(len(fits) if fits.all() else int(fits.argmin()), wanted - (last - first))
        if not accepted:
            break
        from_below = int(is_below[:accepted].sum())
        first, last = first - from_below, last + accepted - from_below
        total, counted = float(sums[accepted - 1]), int(counts[accepted - 1])
        if accepted < len(distance):
            break
    return first, last


def _merged(below: Floats, above: Floats, reach: float) -> tuple[Floats, NDArray[np.bool_]]:
    """Merges two ascending lists of distances up to ``reach`` and returns also which of them are from below."""
    below, above = (side[: np.searchsorted(side, reach, side="right")] for side in (below, above))
    both = np.concatenate([below, above])
    order = np.argsort(both, kind="stable")
    return both[order], order < len(below)


def _distances(weights: Floats, codeword: float) -> NDArray[np.float64]:
    exact = weights.astype(np.float64)
    distance: NDArray[np.float64] = np.abs(exact - codeword) / np.abs(exact)
    return distance


def fix(
    weights: NDArray[np.float32], wanted: int, tolerance: float, smallest: float, dtype: torch.dtype = torch.float32
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Fixes weights to few codewords, one cluster after the other.

    Each round chooses the candidate that is nearest to most of the remaining weights and fixes the weights within the
    tolerance of it. If there are none, the next grid of candidates has one more power of two per value.

    Args:
        weights: float32[n], none of them 0.
        wanted: how many weights are fixed, at most n.
        tolerance: largest mean relative distance within a cluster.
        smallest: where the grid of candidates starts, above 0.
        dtype: the type in which every codeword must be exact.

    Returns:
        The codewords, float32[K], in the order of choice, where a value may occur twice; and the index of the codeword
        of each weight, int32[n], -1 for weights that are not fixed.

    Reference: Subia-Waud, Dasmahapatra, "Weight Fixing Networks", ECCV 2022, algorithm 1.
    """
    values, order = sort_order(weights)
    remaining = SortedRuns(values)
    chosen = np.full(len(weights), -1, dtype=np.int32)
    codewords: list[float] = []
    terms, largest = 0, 0.0
    while wanted:
        if largest != remaining.largest():
            largest = remaining.largest()
            grid, borders = _grid(values, largest, smallest, tolerance, min(terms, MAX_ORDER), dtype)
        ranks = np.concatenate([[0], remaining.rank(borders), [len(remaining)]])
        codeword = float(grid[np.argmax(np.diff(ranks))])
        relaxed = tolerance * 2.0 ** max(0, terms - MAX_ORDER)
        first, last = nearest_window(remaining, codeword, relaxed, wanted)
        if first == last:
            # As in the authors' code, the order is reset only in the next round; the paper resets it for each cluster.
            terms, largest = terms + 1, 0.0
            continue
        for start, stop in remaining.take(first, last):
            chosen[order[start:stop]] = len(codewords)
        codewords.append(codeword)
        wanted -= last - first
    return np.array(codewords, dtype=np.float32), chosen


def _grid(
    values: Floats, largest: float, smallest: float, tolerance: float, order: int, dtype: torch.dtype
) -> tuple[NDArray[np.float64], Integers]:
    """Returns the candidates other than 0, rounded to ``dtype``, and the positions where the nearest one changes."""
    rounded = torch.from_numpy(candidates(largest, smallest, tolerance, order)).to(dtype).double().numpy()
    grid = np.unique(rounded[np.isfinite(rounded) & (rounded != 0)])
    borders = (grid[1:] + grid[:-1]) / 2
    floored = borders.astype(np.float32)  # in the dtype of the weights, or searchsorted would convert all of them
    floored = np.where(floored > borders, np.nextafter(floored, np.float32(-np.inf)), floored)
    return grid, np.searchsorted(values, floored, side="right")
