"""Memory for what is decoded, in large pages where the system has them: each page costs when it is first written."""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ["allocate"]

_PAGE = 1 << 21  # bytes of a large page on x86-64, and on most of arm64


def allocate(count: int, dtype: DTypeLike) -> NDArray[Any]:
    """Give ``np.empty(count, dtype)``; of 2 MB and more it lies in large pages, on Linux, as far as it fills them.

    numpy asks for such pages from 4 MB on, but its arrays begin and end anywhere in one. Here they begin with one.

    Raises:
        MemoryError: there is not so much.

    >>> allocate(3, np.float32).shape
    (3,)
    """
    size = count * np.dtype(dtype).itemsize
    if size >= _PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # too many mappings, or a system without large pages
            mapped = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            start = -np.frombuffer(mapped, np.uint8).ctypes.data % _PAGE
            mapped.madvise(mmap.MADV_HUGEPAGE, start, size // _PAGE * _PAGE)
            return np.frombuffer(mapped, dtype, count, start)
    return np.empty(count, dtype)
