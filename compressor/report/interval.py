"""The 95 % interval of a share of images."""

from __future__ import annotations

import math

__all__ = ["interval_text", "wilson_interval"]

Z = 1.959964  # of the normal distribution, at 97.5 %


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share of ``n`` images, by Wilson's score; 0 and 1 for none.

    >>> low, high = wilson_interval(1.0, 360)
    >>> round(low, 4), round(high, 4)
    (0.9894, 1.0)
    """
    n = max(n, 1)
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def interval_text(low: float, high: float, digits: int = 1) -> str:
    """Writes an interval of a share in percent, with as many decimals as the share beside it.

    >>> interval_text(0.9894, 1.0), interval_text(0.9894, 1.0, 2)
    ('[98.9, 100.0]', '[98.94, 100.00]')
    """
    return f"[{100 * low:.{digits}f}, {100 * high:.{digits}f}]"
