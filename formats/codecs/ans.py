"""Interleaved rANS: as near to the entropy as one likes, also far below one bit an index.

Duda, "Asymmetric numeral systems", 2013; Giesen, "Interleaved entropy coders", 2014.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from compressor.formats.codec import Codec, Stream, register
from compressor.formats.errors import FormatError
from compressor.formats.kernels import LOW, bit_patterns, rans_decode, rans_encode
from compressor.formats.record import index_dtype

__all__ = ["CHUNK", "Ans", "quantise_histogram", "read_frequencies", "write_frequencies"]

CHUNK = 1 << 20  # indices coded together; each chunk can be decoded alone
PRECISIONS = range(8, 17)
LENGTHS = 15  # most bits of a frequency: its length takes 4
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
        """Code with the precision that gives the fewest bytes."""
        if not stream.count:
            return b""
        histogram = np.bincount(indices, minlength=stream.codewords)
        precision, frequencies, size = _best_frequencies(histogram)
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
        precision, frequencies, _ = _best_frequencies(histogram)
        return np.where(frequencies, precision - np.log2(np.maximum(frequencies, 1)), 32.0)

    def max_count(self, size: int, codewords: int) -> int | None:
        """Know no bound: a frequency near all costs next to nothing, all costs nothing."""
        return None


def quantise_histogram(histogram: NDArray[np.int64], precision: int) -> NDArray[np.int64]:
    """Give frequencies summing to 2**precision, at least 1 where used, near the best for the code length.

    >>> quantise_histogram(np.array([70, 0, 29, 1]), 4).tolist()
    [11, 0, 4, 1]
    """
    total = 1 << precision
    shares = histogram * (total / histogram.sum())
    frequencies = np.where(histogram > 0, np.maximum(1, np.floor(shares + 0.5)), 0).astype(np.int64)
    while excess := int(frequencies.sum()) - total:
        # one slot more gains, one fewer costs, about count / frequency bits; by division alone, which all machines
        # round alike, where logarithms may differ in the last bit
        step = -1 if excess > 0 else 1
        able = frequencies > 1 if step < 0 else histogram > 0
        gain = np.where(able, step * histogram / (frequencies + 0.5 * step), -np.inf)
        chosen = np.argsort(-gain, kind="stable")[: min(abs(excess), max(1, int(able.sum()) // 8))]
        frequencies[chosen] += step
    return frequencies


def _best_frequencies(histogram: NDArray[np.int64]) -> tuple[int, NDArray[np.int64], int]:
    """Give precision, frequencies and bytes of the best of all precisions; 0 for one used codeword."""
    used = int(np.count_nonzero(histogram))
    if used == 1:
        return 0, (histogram > 0).astype(np.int64), 0
    best: tuple[int, NDArray[np.int64], int] | None = None
    for precision in PRECISIONS:
        if used > 1 << precision:
            continue
        frequencies = quantise_histogram(histogram, precision)
        if frequencies.max() >> LENGTHS:
            continue
        kept = frequencies > 0
        bits = float((histogram[kept] * (precision - np.log2(frequencies[kept]))).sum())
        size = math.ceil(bits / 8) + _table_size(frequencies)
        if best is None or size < best[2]:
            best = precision, frequencies, size
    assert best is not None  # of two used codewords one may have 2**8 - 1 slots, and 2**15 codewords fit 2**16
    return best


def _bit_lengths(frequencies: NDArray[np.int64]) -> NDArray[np.uint8]:
    return np.frexp(frequencies.astype(np.float64))[1].astype(np.uint8)


def _table_size(frequencies: NDArray[np.int64]) -> int:
    """Give the bytes that ``write_frequencies`` will take."""
    below = np.maximum(_bit_lengths(frequencies).astype(np.int64) - 1, 0)
    return -(-len(frequencies) // 2) - (-int(below.sum()) // 8)


def write_frequencies(frequencies: NDArray[np.int64]) -> bytes:
    """Store frequencies: the bit length of each in 4 bits, low half first; then the bits below the highest.

    >>> write_frequencies(np.array([10, 0, 5, 1])).hex()
    '04130a'
    """
    lengths = _bit_lengths(frequencies)
    padded = np.append(lengths, np.uint8(0)) if len(lengths) % 2 else lengths
    owner, place = _places(lengths)
    bits = (frequencies[owner] >> place & 1).astype(np.uint8)
    return (padded[::2] | padded[1::2] << 4).tobytes() + np.packbits(bits, bitorder="little").tobytes()


def read_frequencies(data: memoryview, codewords: int, precision: int, what: str) -> tuple[NDArray[np.int64], int]:
    """Read frequencies, and the bytes they take; raises FormatError unless they sum to 2**precision."""
    end = -(-codewords // 2)
    halves = np.frombuffer(data[:end], np.uint8)
    lengths = np.stack([halves & 15, halves >> 4], 1).reshape(-1)
    if len(halves) != end or lengths[codewords:].any():
        raise FormatError(f"{what}: the table of frequencies is cut, or has more than {codewords}")
    owner, place = _places(lengths[:codewords])
    size = end + -(-len(owner) // 8)
    bits = np.unpackbits(np.frombuffer(data[end:size], np.uint8), bitorder="little")
    if len(bits) < len(owner) or bits[len(owner) :].any():
        raise FormatError(f"{what}: the table of frequencies is cut, or its padding is not zero")
    frequencies = np.where(lengths[:codewords] > 0, 1 << np.maximum(lengths[:codewords].astype(np.int64) - 1, 0), 0)
    np.add.at(frequencies, owner, bits[: len(owner)].astype(np.int64) << place)
    if frequencies.sum() != 1 << precision:
        raise FormatError(f"{what}: frequencies sum to {frequencies.sum()}, expected {1 << precision}")
    return frequencies, size


def _places(lengths: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Give, for every stored bit below the highest, whose it is and its place, lowest first."""
    below = np.maximum(lengths.astype(np.int64) - 1, 0)
    owner = np.repeat(np.arange(len(lengths)), below)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(below) - below, below)


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
    output = np.empty(stream.count, values.dtype)
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
