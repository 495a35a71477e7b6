"""The interval of an accuracy that was measured on a number of images."""

from __future__ import annotations

import math

__all__ = ["wilson_interval"]

Z = 1.959964  # of the normal distribution, for 95 %


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share, by Wilson's score.

    Args:
        share: that was found, 0 to 1.
        count: of what it is a share of, such as images; 0 is taken as 1.

    Example:
        >>> low, high = wilson_interval(1.0, 360)
        >>> round(low, 4), round(high, 4)
        (0.9894, 1.0)
    """
    n = max(count, 1)
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
