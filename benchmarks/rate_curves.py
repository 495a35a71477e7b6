"""Compares two curves of quality over size: the mean ratio of the sizes at equal quality, as Bjøntegaard's delta rate.

Both curves are piecewise linear in the logarithm of the size. Nothing is picked: each point counts, and where noise
makes a larger file worse than a smaller one, the two become one point in their middle.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

__all__ = ["common_range", "geometric_mean", "mean_ratio", "monotone"]

Curve = Sequence[tuple[float, float]]
"""Points of size and quality."""


def monotone(curve: Curve) -> list[tuple[float, float]]:
    """Returns (log size, quality) in growing order of both; points out of order are replaced by their mean.

    >>> [(round(math.exp(size), 3), quality) for size, quality in monotone([(8, 1), (4, 2), (1, 0)])]
    [(1.0, 0.0), (5.657, 1.5)]
    """
    blocks: list[list[tuple[float, float]]] = []
    for size, quality in sorted(curve):
        blocks.append([(math.log(size), quality)])
        while len(blocks) > 1 and _mean(blocks[-1])[1] <= _mean(blocks[-2])[1]:
            last = blocks.pop()
            blocks[-1] += last
    return [_mean(block) for block in blocks]


def common_range(
    ours: Curve, peer: Curve, low: float = -math.inf, high: float = math.inf
) -> tuple[float, float] | None:
    """Returns the qualities between ``low`` and ``high`` that both curves reach, or None if there are none."""
    curves = monotone(ours), monotone(peer)
    start = max(low, *(curve[0][1] for curve in curves))
    end = min(high, *(curve[-1][1] for curve in curves))
    return (start, end) if start < end else None


def mean_ratio(ours: Curve, peer: Curve, low: float = -math.inf, high: float = math.inf) -> float | None:
    """Returns the geometric mean of our size over the peer's, for all qualities of ``common_range``, equally weighted.

    >>> peer = [(100, 0.8), (200, 0.9)]
    >>> mean_ratio([(50, 0.8), (100, 0.9)], peer), mean_ratio([(50, 0.8), (200, 0.9)], peer)
    (0.5, 0.7071)
    >>> mean_ratio([(50, 0.7), (60, 0.75)], peer) is None
    True
    """
    ends = common_range(ours, peer, low, high)
    if ends is None:
        return None
    curves = monotone(ours), monotone(peer)
    inside = {quality for curve in curves for _, quality in curve if ends[0] < quality < ends[1]}
    knots = sorted({*ends, *inside})
    gaps = [_log_size(curves[0], quality) - _log_size(curves[1], quality) for quality in knots]
    area = sum((right - left) * (a + b) / 2 for (left, a), (right, b) in pairwise(zip(knots, gaps, strict=True)))
    return round(math.exp(area / (ends[1] - ends[0])), 4)


def geometric_mean(ratios: Iterable[float]) -> float:
    """Returns the geometric mean.

    >>> geometric_mean([0.5, 2.0])
    1.0
    """
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logs) / len(logs))


def _mean(points: Curve) -> tuple[float, float]:
    sizes, qualities = zip(*points, strict=True)
    return sum(sizes) / len(points), sum(qualities) / len(points)


def _log_size(curve: Curve, quality: float) -> float:
    """Returns the logarithm of the size at a quality between those of the curve's ends."""
    for (left, low), (right, high) in pairwise(curve):
        if low <= quality <= high:
            return left + (right - left) * (quality - low) / (high - low)
    return curve[0][0]
