"""How much memory a file may make its reader allocate."""

from __future__ import annotations

import os

from compressor.formats.errors import UsageError

__all__ = ["MAX_MEMORY", "allowed_memory", "believable_memory"]

MAX_MEMORY = 32 << 30
"""The most bytes of decoded tensors that ``believable_memory`` allows, and that the writer packs."""

ALWAYS_ALLOWED = 256 << 20
"""Bytes of decoded tensors that ``believable_memory`` allows a file of any size."""

MAX_EXPANSION = 1_000
"""Decoded bytes that it allows for each byte of the file; 1,000 is 0.03 bits for a float32 weight."""


def believable_memory(file_size: int) -> int:
    """Returns the decoded size, in bytes, up to which a file from an unknown sender is accepted.

    Codecs of less than one bit an index can store any number of weights in a few bytes. With this limit a sender must
    send bytes to make the reader allocate memory. At most half of the machine's memory is allowed, since decoding takes
    memory besides.

    Args:
        file_size: the size of the packed file in bytes.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(MAX_MEMORY, memory // 2, max(ALWAYS_ALLOWED, MAX_EXPANSION * file_size))


def allowed_memory(max_memory: int | None, file_size: int) -> int:
    """Returns the most bytes that the decoded tensors of a file may take.

    Args:
        max_memory: what the caller allows; None for what is believable for the size of the file.
        file_size: the size of the packed file in bytes.

    Raises:
        UsageError: ``max_memory`` is no whole number of 1 or more.
    """
    if max_memory is None:
        return believable_memory(file_size)
    if type(max_memory) is not int or max_memory < 1:
        raise UsageError(f"max_memory={max_memory!r}, expected a whole number of bytes, 1 or more")
    return max_memory
