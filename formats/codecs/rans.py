"""What the codecs of rANS streams have in common: decoding tables hold indices or their values."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressor.formats.codecs.base import Codec, Stream
from compressor.formats.codecs.frequencies import estimated_lengths
from compressor.formats.content import index_dtype

__all__ = ["RansCodec"]


class RansCodec(Codec):
    """A codec whose streams are decoded by tables, which hold what each index stands for."""

    @abstractmethod
    def decode_to(self, data: memoryview, stream: Stream, values: NDArray[Any]) -> NDArray[Any]:
        """Returns the value of each index of a stream.

        Args:
            data: the stream.
            stream: its description.
            values: of each codeword, any dtype[K].

        Raises:
            FormatError: tables, sizes, words or final states are not valid.
        """

    def decode(self, data: memoryview, stream: Stream) -> NDArray[Any]:
        """Returns the indices; FormatError as for ``decode_to``."""
        return self.decode_to(data, stream, np.arange(stream.codewords, dtype=index_dtype(stream.codewords)))

    def lookup(self, data: memoryview, stream: Stream, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns the values of the indices, from decoding tables that hold values instead of indices."""
        return self.decode_to(data, stream, values)

    def code_lengths(self, histogram: NDArray[np.int64]) -> NDArray[np.float64]:
        """Returns the bits of each codeword with one table; 32, a whole state, for one that does not occur."""
        return estimated_lengths(histogram)

    def max_count(self, size: int, codewords: int) -> int | None:
        """Returns None: the code of a codeword of frequency 2**P takes no bits at all."""
        return None
