"""Fixed width: every index takes ceil(log2(codewords)) bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from compressor.formats.codec import Codec, Stream, check_indices, register
from compressor.formats.errors import FormatError
from compressor.formats.record import index_dtype

__all__ = ["Bits", "pack_bits", "unpack_bits"]


@register
@dataclass(frozen=True)
class Bits(Codec):
    """Index i in bits [i*b, (i+1)*b), lowest bit first, b = ceil(log2(codewords)); zero padding.

    Example:
        >>> Bits().encode(np.array([1, 2, 3], np.uint8), Stream("fc.weight", 3, 4)).hex()
        '39'
    """

    id: ClassVar[str] = "bits"

    def encode(self, indices: NDArray[Any], stream: Stream) -> bytes:
        """Pack the indices; nothing at all for one codeword."""
        return pack_bits(indices, _width(stream))

    def decode(self, data: memoryview, stream: Stream) -> NDArray[Any]:
        """Unpack; raises FormatError on a wrong size, set padding bits or an index that is too large."""
        _check(data, stream)
        indices = unpack_bits(data, stream.count, _width(stream)).astype(index_dtype(stream.codewords), copy=False)
        if stream.codewords < 1 << _width(stream):
            check_indices(indices, stream)
        return indices

    def lookup(self, data: memoryview, stream: Stream, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Fuse unpacking and lookup where a byte holds whole indices: one table of 256 rows."""
        width = _width(stream)
        if width not in (1, 2, 4) or stream.codewords < 1 << width:
            return super().lookup(data, stream, values)
        _check(data, stream)
        rows = np.ascontiguousarray(values[_FIELDS[width]])  # float32[256, 8 / width]
        looked_up = rows.view(f"V{rows.shape[1] * 4}").reshape(-1)[np.frombuffer(data, np.uint8)]
        return looked_up.view(np.float32)[: stream.count]

    def code_lengths(self, histogram: NDArray[np.int64]) -> NDArray[np.float64]:
        """Give the same width for all."""
        return np.full(len(histogram), float((len(histogram) - 1).bit_length()))

    def max_count(self, size: int, codewords: int) -> int | None:
        """Bound the count by the bits there are; one codeword takes none."""
        width = (codewords - 1).bit_length()
        return 8 * size // width if width else None


def _width(stream: Stream) -> int:
    return (stream.codewords - 1).bit_length()


def _check(data: memoryview, stream: Stream) -> None:
    bits = stream.count * _width(stream)
    if len(data) != -(-bits // 8):
        raise FormatError(
            f"indices of {stream.name!r}: {len(data)} bytes, expected {-(-bits // 8)} for {stream.count} indices "
            f"of {_width(stream)} bits"
        )
    if bits % 8 and data[-1] >> bits % 8:
        raise FormatError(f"indices of {stream.name!r}: the padding bits after the last index are not zero")


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
        rows = _FIELDS[width]
        return rows.view(f"V{rows.shape[1]}").reshape(-1)[stored].view(np.uint8)[:count]
    if width in (8, 16):
        return stored.view("<u2") if width == 16 else stored
    groups = -(-count // 8)
    padded = np.zeros((groups, width), np.uint8)
    padded.reshape(-1)[: len(stored)] = stored
    fields = np.empty((groups, 8), np.uint32)
    for position in range(8):
        byte, shift = divmod(position * width, 8)
        word = np.zeros(groups, np.uint32)
        for extra in range(-(-(shift + width) // 8)):
            word |= padded[:, byte + extra].astype(np.uint32) << np.uint32(8 * extra)
        fields[:, position] = (word >> np.uint32(shift)) & np.uint32((1 << width) - 1)
    return fields.reshape(-1)[:count]


def _fields(width: int) -> NDArray[np.uint8]:
    """Give uint8[256, 8 / width]: the fields of every byte."""
    shifts = np.arange(0, 8, width)
    return (np.arange(256)[:, None] >> shifts & (1 << width) - 1).astype(np.uint8)


_FIELDS = {width: _fields(width) for width in (1, 2, 4)}
