"""Packing of fields of a fixed number of bits into bytes, lowest bit first, and table lookup of the results."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from compressor.formats.io.huge_pages import allocate

__all__ = ["FIELDS", "pack_bits", "take", "unpack_bits"]

_CHUNK = 1 << 15  # positions looked up at a time


def take(values: NDArray[Any], positions: NDArray[Any], mode: Literal["raise", "clip"] = "raise") -> NDArray[Any]:
    """Returns ``values.take(positions)``, computed in chunks.

    numpy converts positions to 64 bits first; in chunks this temporary stays in the cache.

    Args:
        values: K values of any dtype.
        positions: uint[n].
        mode: how ``numpy.take`` treats positions of K or more: "raise" (default), or "clip", which takes half the time
            and is safe where all positions are known to be below K.

    Returns:
        n values of the dtype of ``values``.

    >>> take(np.array([1.5, -2.0]), np.array([1, 0, 1], np.uint8)).tolist()
    [-2.0, 1.5, -2.0]
    """
    gathered = allocate(len(positions), values.dtype)
    for start in range(0, len(positions), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        values.take(positions[chunk], out=gathered[chunk], mode=mode)
    return gathered


def pack_bits(indices: NDArray[Any], width: int) -> bytes:
    """Returns indices packed into ceil(n * width / 8) bytes, lowest bit first.

    Args:
        indices: uint[n], each below 2 ** ``width``.
        width: the bits of a field, 0 to 25.

    >>> pack_bits(np.array([5, 1]), 3).hex()
    '0d'
    """
    groups = -(-len(indices) // 8)
    padded = np.zeros(groups * 8, np.uint32)  # eight indices fill exactly ``width`` bytes
    padded[: len(indices)] = indices
    packed = np.zeros((groups, width), np.uint8)
    for position, column in enumerate(padded.reshape(-1, 8).T):
        byte, shift = divmod(position * width, 8)
        shifted = column << np.uint32(shift)
        for extra in range(-(-(shift + width) // 8)):
            packed[:, byte + extra] |= (shifted >> np.uint32(8 * extra)).astype(np.uint8)
    return packed.tobytes()[: -(-len(indices) * width // 8)]


def unpack_bits(data: memoryview | bytes, count: int, width: int) -> NDArray[Any]:
    """Returns uint[count], the fields packed in ``data``; the inverse of ``pack_bits``.

    Args:
        data: ceil(count * width / 8) bytes.
        count: the number of fields.
        width: the bits of a field, 0 to 25.

    Returns:
        An array of 8, 16 or 32 bits an item, read-only where it is a view of ``data``.

    >>> unpack_bits(bytes.fromhex("0d"), 2, 3).tolist()
    [5, 1]
    """
    stored = np.frombuffer(data, np.uint8)
    if width in (1, 2, 4):
        rows = FIELDS[width]
        return take(rows.view(f"u{rows.shape[1]}").reshape(-1), stored, "clip").view(np.uint8)[:count]
    if width in (8, 16):
        return stored.view("<u2") if width == 16 else stored
    groups = -(-count // 8)
    padded = np.zeros(groups * width + 32, np.uint8)  # 4-byte words are read beyond the last byte
    padded[: len(stored)] = stored
    fields = np.empty((groups, 8), np.uint8 if width < 8 else np.uint16 if width < 16 else np.uint32)
    for position in range(8):
        byte, shift = divmod(position * width, 8)
        words = np.ndarray(groups, "<u4", padded, byte, width)  # the word of this field in each group
        np.bitwise_and(words >> np.uint32(shift), np.uint32((1 << width) - 1), fields[:, position], casting="unsafe")
    return fields.reshape(-1)[:count]


def _fields(width: int) -> NDArray[np.uint8]:
    """Returns uint8[256, 8 / width], the fields in each byte."""
    shifts = np.arange(0, 8, width)
    return (np.arange(256)[:, None] >> shifts & (1 << width) - 1).astype(np.uint8)


FIELDS = {width: _fields(width) for width in (1, 2, 4)}
"""For each width that divides a byte, uint8[256, 8 / width]: the fields in each byte."""
