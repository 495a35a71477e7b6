"""The C library's settings for memory that is freed, which a command may choose for its own process."""

from __future__ import annotations

import ctypes
import os
import sys

__all__ = ["keep_freed_memory", "return_freed_memory"]

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, parameters of ``mallopt``
LARGEST_TRIM, LARGEST_MMAP = (1 << 31) - 1, 1 << 25  # bytes, the largest that each accepts
RETURNED = 1 << 21  # bytes; half of it costs a fifth of the time, four times as much a fifth of the memory


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory until the process ends, where the user has not set its variables.

    Every training allocates and frees the same gradients and activations in each step; memory that was returned to the
    system has to be cleared anew. The setting is for the whole process, so only a command calls this, never the
    library. Environment variables ``MALLOC_...``, or ``GLIBC_TUNABLES`` for it, are the user's decision and stay.

    Returns:
        Whether glibc keeps it: False on other systems and where the user has decided.
    """
    return _set_thresholds(LARGEST_MMAP, LARGEST_TRIM)


def return_freed_memory() -> bool:
    """Makes glibc return the memory of large blocks to the system when they are freed, with the same exceptions.

    By default it keeps them as soon as one has been freed. Without training, layers are worked on one after the other,
    each with blocks of other sizes, for which those that are kept are of little use.

    Returns:
        Whether glibc returns it: False on other systems and where the user has decided.
    """
    return _set_thresholds(RETURNED, RETURNED)


def _set_thresholds(mmap: int, trim: int) -> bool:
    decided = any(name.startswith("MALLOC_") for name in os.environ)
    if sys.platform != "linux" or decided or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    kept = library.mallopt(MMAP_THRESHOLD, mmap), library.mallopt(TRIM_THRESHOLD, trim)
    return kept == (1, 1)
