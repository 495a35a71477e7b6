"""The C library's settings for memory that is freed, which a command may choose for its own process."""

from __future__ import annotations

import ctypes
import os
import sys

__all__ = ["keep_freed_memory"]

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, parameters of ``mallopt``
LARGEST_TRIM, LARGEST_MMAP = (1 << 31) - 1, 1 << 25  # bytes, the largest that each accepts


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory until the process ends, where the user has not set its variables.

    Every training allocates and frees the same gradients and activations in each step; memory that was returned to the
    system has to be cleared anew. The setting is for the whole process, so only a command calls this, never the
    library. Environment variables ``MALLOC_...``, or ``GLIBC_TUNABLES`` for it, are the user's decision and stay.

    Returns:
        Whether glibc keeps it: False on other systems and where the user has decided.
    """
    decided = any(name.startswith("MALLOC_") for name in os.environ)
    if sys.platform != "linux" or decided or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    kept = library.mallopt(MMAP_THRESHOLD, LARGEST_MMAP), library.mallopt(TRIM_THRESHOLD, LARGEST_TRIM)
    return kept == (1, 1)
