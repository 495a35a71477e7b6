"""Numbers of bytes as the command line writes them: 450KB, 1.5MB."""

from __future__ import annotations

__all__ = ["size_text"]

UNITS = (("GB", 10**9), ("MB", 10**6), ("KB", 10**3))


def size_text(size: float, digits: int | None = None) -> str:
    """Writes a number of bytes in the largest decimal unit that needs at most three decimals.

    Args:
        size: whole bytes, or a mean of them.
        digits: that it is rounded to before; None: it is exact.

    >>> [size_text(size) for size in (450_000, 1_500_000, 1_048_576, 999)]
    ['450KB', '1.5MB', '1048.576KB', '999B']
    >>> [size_text(size, 3) for size in (67_307, 1_509_760, 250, 3e9, 999_499, 999_500)]
    ['67.3KB', '1.51MB', '250B', '3GB', '999KB', '1MB']
    """
    whole = round(size if digits is None else float(f"{size:.{digits}g}"))
    for unit, factor in UNITS:
        if whole >= factor and whole % (factor // 1000) == 0:
            return f"{whole / factor:.3f}".rstrip("0").rstrip(".") + unit
    return f"{whole}B"
