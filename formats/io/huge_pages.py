"""Memory for decoded data, in huge pages where the system has them: fewer page faults when it is first written."""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ["allocate"]

_PAGE = 1 << 21  # bytes of a huge page on x86-64 and most arm64 systems


def allocate(count: int, dtype: DTypeLike) -> NDArray[Any]:
    """Returns an uninitialised array; on Linux, one of 2 MiB or more is in huge pages as far as it fills them.

    numpy requests huge pages from 4 MiB on, but its arrays begin anywhere in a page; these begin at the start of one.

    Args:
        count: the number of items.
        dtype: the dtype of the items.

    Returns:
        An array of shape [count].

    Raises:
        MemoryError: there is not enough memory.

    >>> allocate(3, np.float32).shape
    (3,)
    """
    size = count * np.dtype(dtype).itemsize
    if size >= _PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # too many mappings, or a system without huge pages
            mapped = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            start = -np.frombuffer(mapped, np.uint8).ctypes.data % _PAGE
            mapped.madvise(mmap.MADV_HUGEPAGE, start, size // _PAGE * _PAGE)
            return np.frombuffer(mapped, dtype, count, start)
    return np.empty(count, dtype)
