"""Interleaved range asymmetric numeral systems (rANS): near the entropy, also far below one bit an index.

Duda, "Asymmetric numeral systems", arXiv:1311.2540, 2013; Giesen, "Interleaved entropy coders", arXiv:1402.3392, 2014.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from compressor.formats.codecs.base import Stream
from compressor.formats.codecs.chunks import CHUNK, lanes_for, split_chunks
from compressor.formats.codecs.frequencies import (
    PRECISIONS,
    choose_frequencies,
    decoding_table,
    read_frequencies,
    write_frequencies,
)
from compressor.formats.codecs.kernels import LOW, bit_patterns, rans_decode, rans_encode
from compressor.formats.codecs.rans import RansCodec
from compressor.formats.codecs.registry import register
from compressor.formats.errors import FormatError
from compressor.formats.io.huge_pages import allocate

__all__ = ["Ans"]


@register
@dataclass(frozen=True)
class Ans(RansCodec):
    """Codes with integer frequencies that sum to a power of two, 32-bit states in several lanes, and 16-bit words.

    Stores a byte (precision + 32 * log2 of the number of lanes), the frequencies, the number of words of each chunk
    (u32), then the chunks: the state of each lane (u32), then the words (u16). A stream of no indices is empty.
    """

    id: ClassVar[str] = "ans"
    max_codewords: ClassVar[int] = 1 << 15

    def encode(self, indices: NDArray[Any], stream: Stream) -> bytes:
        """Returns the indices coded with frequencies that give about the fewest bytes."""
        if not stream.count:
            return b""
        histogram = np.bincount(indices, minlength=stream.codewords)
        precision, frequencies, size = choose_frequencies(histogram)
        lanes = lanes_for(size, stream.count)
        coded = [
            _encode_chunk(indices[start : start + CHUNK], frequencies, precision, lanes)
            for start in range(0, stream.count, CHUNK)
        ]
        head = bytes([precision | (lanes.bit_length() - 1) << 5]) + write_frequencies(frequencies)
        words = np.array([(len(chunk) - 4 * lanes) // 2 for chunk in coded], "<u4")
        return head + words.tobytes() + b"".join(coded)

    def decode_to(self, data: memoryview, stream: Stream, values: NDArray[Any]) -> NDArray[Any]:
        """Returns the value of each index; FormatError unless tables, sizes, words and final states are all valid."""
        what = f"indices of {stream.name!r}"
        if not stream.count:
            if len(data):
                raise FormatError(f"{what}: {len(data)} bytes for no indices, expected none")
            return np.empty(0, values.dtype)
        if not len(data):
            raise FormatError(f"{what}: no bytes for {stream.count} indices")
        precision, lanes = data[0] & 31, 1 << (data[0] >> 5)
        if precision > PRECISIONS[-1]:
            raise FormatError(f"{what}: precision {precision}, expected at most {PRECISIONS[-1]}")
        frequencies, size = read_frequencies(data[1:], stream.codewords, precision, what)
        chunks = split_chunks(data[1 + size :], -(-stream.count // CHUNK), lanes, what)
        table = decoding_table(frequencies, values)
        output = allocate(stream.count, values.dtype)
        for number, (states, words) in enumerate(chunks):
            chunk = output[number * CHUNK : (number + 1) * CHUNK]
            needed = rans_decode(bit_patterns(chunk), states, table, words, precision)
            if needed != len(words) or (states != LOW).any():
                fault = f"its {len(words)} words do not hold {len(chunk)} indices exactly"
                raise FormatError(f"{what}, chunk {number}: {fault}")
        return output


def _encode_chunk(indices: NDArray[Any], frequencies: NDArray[np.int64], precision: int, lanes: int) -> bytes:
    """Returns the states and words of a chunk."""
    words = np.empty(len(indices), np.uint16)
    states = np.full(lanes, LOW, np.int64)
    starts = np.cumsum(frequencies) - frequencies
    first = rans_encode(words, states, indices, frequencies, starts, precision)
    return states.astype("<u4").tobytes() + words[first:].astype("<u2").tobytes()
