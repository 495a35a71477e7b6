"""Fixed-width coding: every index of K codewords takes ceil(log2 K) bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from compressor.formats.codecs.base import Codec, Stream, check_indices
from compressor.formats.codecs.bitpacking import FIELDS, pack_bits, take, unpack_bits
from compressor.formats.codecs.registry import register
from compressor.formats.content import index_dtype
from compressor.formats.errors import FormatError

__all__ = ["Bits"]


@register
@dataclass(frozen=True)
class Bits(Codec):
    """Stores index i in bits [i * b, (i + 1) * b) of the stream, lowest bit first, with b = ceil(log2 K).

    The last byte is padded with zeros. With one codeword the stream is empty.

    Example:
        >>> Bits().encode(np.array([1, 2, 3], np.uint8), Stream("fc.weight", 3, 4)).hex()
        '39'
    """

    id: ClassVar[str] = "bits"

    def encode(self, indices: NDArray[Any], stream: Stream) -> bytes:
        """Returns the packed indices; no bytes for one codeword."""
        return pack_bits(indices, _width(stream))

    def decode(self, data: memoryview, stream: Stream) -> NDArray[Any]:
        """Returns the unpacked indices; FormatError for a wrong size, set padding bits or an index of K or more."""
        _check(data, stream)
        indices = unpack_bits(data, stream.count, _width(stream)).astype(index_dtype(stream.codewords), copy=False)
        if stream.codewords < 1 << _width(stream):
            check_indices(indices, stream)
        return indices

    def lookup(self, data: memoryview, stream: Stream, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns the values of the indices; where bytes hold whole indices, those of a byte are one row of a table."""
        width = _width(stream)
        if width not in (1, 2, 4) or stream.codewords < 1 << width:
            return super().lookup(data, stream, values)
        _check(data, stream)
        rows = np.ascontiguousarray(values[FIELDS[width]])  # float32[256, 8 / width]
        rows_as_items = rows.view({2: "u8", 4: "c16", 8: "V32"}[rows.shape[1]]).reshape(-1)
        return take(rows_as_items, np.frombuffer(data, np.uint8), "clip").view(np.float32)[: stream.count]

    def code_lengths(self, histogram: NDArray[np.int64]) -> NDArray[np.float64]:
        """Returns b for every codeword."""
        return np.full(len(histogram), float((len(histogram) - 1).bit_length()))

    def max_count(self, size: int, codewords: int) -> int | None:
        """Returns the number of fields of b bits; None for one codeword, which takes no bits."""
        width = (codewords - 1).bit_length()
        return 8 * size // width if width else None


def _width(stream: Stream) -> int:
    return (stream.codewords - 1).bit_length()


def _check(data: memoryview, stream: Stream) -> None:
    """Checks size and padding of a stream."""
    bits = stream.count * _width(stream)
    if len(data) != -(-bits // 8):
        raise FormatError(
            f"indices of {stream.name!r}: {len(data)} bytes, expected {-(-bits // 8)} for {stream.count} indices "
            f"of {_width(stream)} bits"
        )
    if bits % 8 and data[-1] >> bits % 8:
        raise FormatError(f"indices of {stream.name!r}: the padding bits after the last index are not zero")
