"""Interleaved rANS: as near to the entropy as one likes, also far below one bit an index.

Duda, "Asymmetric numeral systems", 2013; Giesen, "Interleaved entropy coders", 2014.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from compressor.formats.codecs.base import Codec, Stream
from compressor.formats.codecs.frequencies import (
    FRACTION,
    PRECISIONS,
    choose_frequencies,
    code_lengths,
    read_frequencies,
    write_frequencies,
)
from compressor.formats.codecs.kernels import LOW, bit_patterns, rans_decode, rans_encode
from compressor.formats.codecs.registry import register
from compressor.formats.content import index_dtype
from compressor.formats.errors import FormatError
from compressor.formats.io.huge_pages import allocate

__all__ = ["CHUNK", "Ans"]

CHUNK = 1 << 20  # indices coded together; each chunk can be decoded alone
MAX_LANES = 8
LANE_BYTES = 4096  # a lane for so many coded bytes: its state costs about 3


@register
@dataclass(frozen=True)
class Ans(Codec):
    """Integer frequencies that sum to a power of two, 32-bit states, 16-bit words, lanes taken in turn.

    A stream: u8 precision + 32 * log2(lanes); the frequencies; u32 words of each chunk; the chunks, each the
    states (u32 a lane), then the words (u16). No indices, no bytes.
    """

    id: ClassVar[str] = "ans"
    max_codewords: ClassVar[int] = 1 << 15

    def encode(self, indices: NDArray[Any], stream: Stream) -> bytes:
        """Code with frequencies that give about the fewest bytes."""
        if not stream.count:
            return b""
        histogram = np.bincount(indices, minlength=stream.codewords)
        precision, frequencies, size = choose_frequencies(histogram)
        chunks = -(-stream.count // CHUNK)
        lanes = min(MAX_LANES, 1 << (size // chunks // LANE_BYTES).bit_length())
        coded = [
            _encode_chunk(indices[at : at + CHUNK], frequencies, precision, lanes)
            for at in range(0, stream.count, CHUNK)
        ]
        head = bytes([precision | (lanes.bit_length() - 1) << 5]) + write_frequencies(frequencies)
        words = np.array([(len(chunk) - 4 * lanes) // 2 for chunk in coded], "<u4")
        return head + words.tobytes() + b"".join(coded)

    def decode(self, data: memoryview, stream: Stream) -> NDArray[Any]:
        """Decode; raises FormatError unless table, sizes, words and the states at the end are all exact."""
        return _decode(data, stream, np.arange(stream.codewords, dtype=index_dtype(stream.codewords)))

    def lookup(self, data: memoryview, stream: Stream, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Decode straight to values."""
        return _decode(data, stream, values)

    def code_lengths(self, histogram: NDArray[np.int64]) -> NDArray[np.float64]:
        """Give the bits at the chosen frequencies; a codeword without one costs a whole state."""
        if not histogram.any():
            return np.full(len(histogram), 32.0)
        precision, frequencies, _ = choose_frequencies(histogram)
        return np.where(frequencies > 0, code_lengths(frequencies, precision) / (1 << FRACTION), 32.0)

    def max_count(self, size: int, codewords: int) -> int | None:
        """Know no bound: a frequency near all costs next to nothing, all costs nothing."""
        return None


def _encode_chunk(indices: NDArray[Any], frequencies: NDArray[np.int64], precision: int, lanes: int) -> bytes:
    words = np.empty(len(indices), np.uint16)
    states = np.full(lanes, LOW, np.int64)
    starts = np.cumsum(frequencies) - frequencies
    first = rans_encode(words, states, indices, frequencies, starts, precision)
    return states.astype("<u4").tobytes() + words[first:].astype("<u2").tobytes()


def _decode(data: memoryview, stream: Stream, values: NDArray[Any]) -> NDArray[Any]:
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
    chunks = _split(data[1 + size :], -(-stream.count // CHUNK), lanes, what)
    table = _slots(frequencies, values)
    output = allocate(stream.count, values.dtype)
    for number, (states, words) in enumerate(chunks):
        part = output[number * CHUNK : (number + 1) * CHUNK]
        wanted = rans_decode(bit_patterns(part), states, table, words, precision)
        if wanted != len(words) or (states != LOW).any():
            raise FormatError(f"{what}, chunk {number}: its {len(words)} words do not hold {len(part)} indices exactly")
    return output


def _split(data: memoryview, count: int, lanes: int, what: str) -> list[tuple[NDArray[np.int64], NDArray[np.uint16]]]:
    """Cut the chunks: states and words of each."""
    if len(data) < 4 * count:
        raise FormatError(f"{what}: {len(data)} bytes, expected the sizes of {count} chunks")
    sizes = np.frombuffer(data[: 4 * count], "<u4").astype(np.int64)
    expected = int(4 * count + (4 * lanes + 2 * sizes).sum())
    if len(data) != expected:
        raise FormatError(f"{what}: {len(data)} bytes after the frequencies, expected {expected}")
    chunks = []
    at = 4 * count
    for size in sizes.tolist():
        states = np.frombuffer(data[at : at + 4 * lanes], "<u4").astype(np.int64)
        if (states < LOW).any():
            raise FormatError(f"{what}: a state below {LOW}")
        at += 4 * lanes
        chunks.append((states, np.frombuffer(data[at : at + 2 * size], "<u2")))
        at += 2 * size
    return chunks


def _slots(frequencies: NDArray[np.int64], values: NDArray[Any]) -> NDArray[np.uint64]:
    """Make the decoding table: for each slot, frequency, place within the index's slots, bits of its value."""
    owner = np.repeat(np.arange(len(frequencies)), frequencies)
    within = np.arange(len(owner)) - (np.cumsum(frequencies) - frequencies)[owner]
    return (frequencies[owner] << 48 | within << 32 | bit_patterns(values)[owner]).astype(np.uint64)
