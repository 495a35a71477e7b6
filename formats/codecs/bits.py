"""Fixed width: every index takes ceil(log2(codewords)) bits."""

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
        rows = np.ascontiguousarray(values[FIELDS[width]])  # float32[256, 8 / width]
        whole_rows = rows.view({2: "u8", 4: "c16", 8: "V32"}[rows.shape[1]]).reshape(-1)
        return take(whole_rows, np.frombuffer(data, np.uint8), "clip").view(np.float32)[: stream.count]

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
