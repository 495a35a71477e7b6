"""Fields of a fixed number of bits packed into bytes, lowest bit first."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from compressor.formats.io.huge_pages import allocate

__all__ = ["FIELDS", "pack_bits", "take", "unpack_bits"]

_AT_ONCE = 1 << 15  # places


def take(values: NDArray[Any], places: NDArray[Any], mode: Literal["raise", "clip"] = "raise") -> NDArray[Any]:
    """Give ``values.take(places)`` in pieces: numpy makes eight bytes of every place, which here stay in the cache.

    Args:
        values: any dtype [K].
        places: unsigned [n].
        mode: of ``take``; "clip" is half as slow, where all places are known to be within.

    >>> take(np.array([1.5, -2.0]), np.array([1, 0, 1], np.uint8)).tolist()
    [-2.0, 1.5, -2.0]
    """
    gathered = allocate(len(places), values.dtype)
    for at in range(0, len(places), _AT_ONCE):
        values.take(places[at : at + _AT_ONCE], out=gathered[at : at + _AT_ONCE], mode=mode)
    return gathered


def pack_bits(indices: NDArray[Any], width: int) -> bytes:
    """Pack uint[n] into ceil(n * width / 8) bytes, lowest bit first, for widths 0 to 25.

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
    """Give uint[count] of the ``width``-bit fields of ``data``: the inverse of ``pack_bits``.

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
    padded = np.zeros(groups * width + 32, np.uint8)  # words are read from where a field begins: past the last one too
    padded[: len(stored)] = stored
    fields = np.empty((groups, 8), np.uint8 if width < 8 else np.uint16 if width < 16 else np.uint32)
    for position in range(8):
        byte, shift = divmod(position * width, 8)
        words = np.ndarray(groups, "<u4", padded, byte, width)  # one of each group
        np.bitwise_and(words >> np.uint32(shift), np.uint32((1 << width) - 1), fields[:, position], casting="unsafe")
    return fields.reshape(-1)[:count]


def _fields(width: int) -> NDArray[np.uint8]:
    """Give uint8[256, 8 / width]: the fields of every byte."""
    shifts = np.arange(0, 8, width)
    return (np.arange(256)[:, None] >> shifts & (1 << width) - 1).astype(np.uint8)


FIELDS = {width: _fields(width) for width in (1, 2, 4)}
