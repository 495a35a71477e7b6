"""Clustering by relative distance: which weights are fixed to which sums of a few powers of two.

The weights are sorted once. What lies within a relative distance of a codeword is then a window of them, so that a
cluster costs little more than reading the weights it takes, and never a table of weights by codewords.

Reference: Subia-Waud, Dasmahapatra, "Weight Fixing Networks", ECCV 2022.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from compressor.clustering.sorted_runs import Remaining, sort_order

__all__ = ["candidates", "fix", "nearest_window"]

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.integer[Any]]

MAX_ORDER = 20  # after which more terms cannot help, and the tolerance is doubled instead
CHUNK, MAX_CHUNK = 256, 1 << 20  # weights looked at on either side at a time


def candidates(largest: float, smallest: float, tolerance: float, order: int) -> NDArray[np.float64]:
    """Give the values that weights may be fixed to: a geometric grid, each of at most ``order + 1`` powers of two.

    Neighbours on the grid are apart by ``(1 + tolerance) / (1 - tolerance)``, so that between them no weight is
    further than the tolerance from one; rounding to few terms then moves them.

    Args:
        largest: the largest magnitude there is; the grid ends below it.
        smallest: where the grid starts, above 0, taken down to a power of two.
        tolerance: relative, 0 to 1.
        order: how many powers of two may follow the first.

    Returns:
        float64, ascending, 0 and negatives among them.

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
    """Give ``first * ratio^j`` while below ``largest``, and the first at any rate; by multiplying, alike everywhere."""
    steps = np.full(max(0, int(np.log(largest / first) / np.log(ratio))) + 2, ratio)
    steps[0] = first
    targets = np.multiply.accumulate(steps)
    kept: NDArray[np.float64] = targets[: max(1, int(np.searchsorted(targets, largest)))]
    return kept


def _power_of_two(values: NDArray[np.float64], lowest: int) -> NDArray[np.float64]:
    """Round to signed powers of two, nearest in the logarithm, no smaller than ``2^lowest``."""
    mantissa, exponent = np.frexp(np.abs(values))
    exponent = np.maximum(exponent - (mantissa < np.sqrt(0.5)), lowest)
    rounded: NDArray[np.float64] = np.copysign(np.ldexp(1.0, exponent), values)
    return rounded


def nearest_window(remaining: Remaining, codeword: float, tolerance: float, wanted: int) -> tuple[int, int]:
    """Find the most weights, nearest first, whose mean relative distance ``|w - c| / |w|`` is within the tolerance.

    Distances of 0 do not count in the mean. Both sides of the codeword are read outwards in growing chunks and
    merged, so the cost is that of the weights taken and no sum loses digits.

    Args:
        codeword: c, not 0, float32.
        wanted: how many at most.

    Returns:
        Ranks (first, last) of a window of what remains, ``last`` not included; empty if the nearest is too far.
    """
    # Divergence: a weight never changes sign; the paper's distance to a codeword of the other sign is above 1.
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
        fits = sums <= tolerance * counts  # a mean of ascending distances only grows
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
    """Merge ascending distances up to ``reach``, those below the codeword first where equal, and tell them apart."""
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
    """Fix so many weights to few codewords: again and again the weights nearest to the candidate with most of them.

    Args:
        weights: float32[n], none of them 0.
        wanted: how many are fixed, at most n.
        tolerance: of the mean relative distance within a cluster.
        smallest: where the grid of candidates starts.
        dtype: in which codewords must be exact.

    Returns:
        codewords, float32[K], in order of choice, perhaps one twice; and which each weight is fixed to, int32[n], -1
        for none.

    Reference: Subia-Waud, Dasmahapatra, "Weight Fixing Networks", ECCV 2022, algorithm 1.
    """
    values, order = sort_order(weights)
    remaining = Remaining(values)
    chosen = np.full(len(weights), -1, dtype=np.int32)
    codewords: list[float] = []
    terms, largest = 0, 0.0
    while wanted:
        if largest != remaining.largest():
            largest = remaining.largest()
            grid, borders = _grid(values, largest, smallest, tolerance, min(terms, MAX_ORDER), dtype)
        ranks = np.concatenate([[0], remaining.rank(borders), [len(remaining)]])
        codeword = float(grid[np.argmax(np.diff(ranks))])
        lenient = tolerance * 2.0 ** max(0, terms - MAX_ORDER)
        first, last = nearest_window(remaining, codeword, lenient, wanted)
        if first == last:
            # As in the authors' code, the order goes down again only in the next round; in the paper, for each cluster.
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
    """Give the candidates but for 0, rounded to ``dtype``, and where in the sorted weights the nearest one changes."""
    rounded = torch.from_numpy(candidates(largest, smallest, tolerance, order)).to(dtype).double().numpy()
    grid = np.unique(rounded[np.isfinite(rounded) & (rounded != 0)])
    borders = (grid[1:] + grid[:-1]) / 2
    downwards = borders.astype(np.float32)  # in the weights' own dtype, or the search would copy them all
    downwards = np.where(downwards > borders, np.nextafter(downwards, np.float32(-np.inf)), downwards)
    return grid, np.searchsorted(values, downwards, side="right")
