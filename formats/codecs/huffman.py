"""Canonical Huffman: short codes for frequent indices.

Huffman, "A Method for the Construction of Minimum-Redundancy Codes", 1952. Lengths are limited by package-merge:
Larmore, Hirschberg, "A Fast Algorithm for Optimal Length-Limited Huffman Codes", 1990.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from bitarray import bitarray
from bitarray.util import canonical_huffman
from numpy.typing import NDArray

from compressor.formats.codecs.base import Codec, Stream
from compressor.formats.codecs.kernels import PADDING, bit_patterns, huffman_decode
from compressor.formats.codecs.registry import register
from compressor.formats.content import index_dtype
from compressor.formats.errors import FormatError
from compressor.formats.io.huge_pages import allocate

__all__ = ["CHUNK", "LIMIT", "Huffman", "code_table", "limited_lengths", "package_merge"]

LIMIT = 15  # longest code: a length takes 4 bits, a decoding table 2**15 entries
LANES = 4  # chunks decoded side by side
CHUNK = 1 << 16  # indices coded together; each chunk begins on a byte and can be decoded alone


@register
@dataclass(frozen=True)
class Huffman(Codec):
    """Code lengths (4 bits a codeword, low half first), chunk sizes (u32 each), chunks (first bit highest).

    One used codeword has the one-bit code 0. No indices, no bytes.
    """

    id: ClassVar[str] = "huffman"
    max_codewords: ClassVar[int] = 1 << LIMIT

    def encode(self, indices: NDArray[Any], stream: Stream) -> bytes:
        """Code with the lengths that suit the indices' own histogram."""
        if not stream.count:
            return b""
        lengths = limited_lengths(np.bincount(indices, minlength=stream.codewords))
        codes = code_table(lengths)
        chunks = []
        for start in range(0, stream.count, CHUNK):
            bits = bitarray(endian="big")
            bits.encode(codes, indices[start : start + CHUNK].tolist())
            chunks.append(bits.tobytes())
        padded = np.append(lengths, np.uint8(0)) if len(lengths) % 2 else lengths
        sizes = np.array([len(chunk) for chunk in chunks], "<u4")
        return (padded[::2] | padded[1::2] << 4).tobytes() + sizes.tobytes() + b"".join(chunks)

    def decode(self, data: memoryview, stream: Stream) -> NDArray[Any]:
        """Decode; raises FormatError unless lengths, sizes, counts and padding are all exact."""
        return _decode(data, stream, np.arange(stream.codewords, dtype=index_dtype(stream.codewords)))

    def lookup(self, data: memoryview, stream: Stream, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Decode straight to values."""
        return _decode(data, stream, values)

    def code_lengths(self, histogram: NDArray[np.int64]) -> NDArray[np.float64]:
        """Give the lengths of the code for ``histogram``; a codeword it lacks costs the longest."""
        lengths = limited_lengths(histogram)
        return np.where(lengths > 0, lengths, LIMIT).astype(np.float64)

    def max_count(self, size: int, codewords: int) -> int | None:
        """Bound the count by one bit an index."""
        return 8 * size


def limited_lengths(histogram: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Give the code length of every codeword, uint8[K], 0 where unused, none above LIMIT.

    >>> limited_lengths(np.array([5, 2, 0, 1])).tolist()
    [1, 2, 0, 2]
    """
    used = np.flatnonzero(histogram)
    lengths = np.zeros(len(histogram), np.uint8)
    if not len(used):
        return lengths
    counts, symbols = canonical_huffman({int(symbol): int(histogram[symbol]) for symbol in used})[1:]
    if len(counts) <= LIMIT + 1:
        lengths[symbols] = np.repeat(np.arange(len(counts)), counts)
    else:
        lengths[used] = package_merge(histogram[used])
    return lengths


def package_merge(counts: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Give the best code lengths up to LIMIT: each symbol's length is how often its coin is bought.

    >>> package_merge(np.array([5, 2, 1])).tolist()
    [1, 2, 2]
    """
    leaves = [(int(count), (symbol,)) for symbol, count in enumerate(counts)]
    packages: list[tuple[int, tuple[int, ...]]] = []
    for _ in range(LIMIT):
        coins = sorted(leaves + packages)
        pairs = zip(coins[::2], coins[1::2], strict=False)
        packages = [(one[0] + two[0], one[1] + two[1]) for one, two in pairs]
    bought = [symbol for _, symbols in packages[: len(counts) - 1] for symbol in symbols]
    return np.bincount(bought, minlength=len(counts)).astype(np.uint8)


def code_table(lengths: NDArray[np.uint8]) -> dict[int, bitarray]:
    """Give the canonical code: codewords by (length, index), each code the last plus one.

    >>> {symbol: code.to01() for symbol, code in code_table(np.array([1, 2, 0, 2], np.uint8)).items()}
    {0: '0', 1: '10', 3: '11'}
    """
    codes = {}
    code = length = 0
    for symbol in np.lexsort((np.arange(len(lengths)), lengths)).tolist():
        if lengths[symbol]:
            code <<= int(lengths[symbol]) - length
            length = int(lengths[symbol])
            codes[symbol] = bitarray(f"{code:0{length}b}")
            code += 1
    return codes


def _decode(data: memoryview, stream: Stream, values: NDArray[Any]) -> NDArray[Any]:
    output = allocate(stream.count, values.dtype)
    if not stream.count:
        if len(data):
            raise FormatError(f"indices of {stream.name!r}: {len(data)} bytes for no indices, expected none")
        return output
    lengths, begins = _split(data, stream)
    table, width = _prefixes(lengths, values)
    coded = np.concatenate([np.frombuffer(data, np.uint8), np.zeros(PADDING, np.uint8)])
    ends = np.array(begins[:-1], np.int64) * 8
    lost = False
    for rows, chunks in _together(bit_patterns(output)):
        at = ends[chunks]
        lost |= bool(huffman_decode(rows, at, table, coded, width))
        ends[chunks] = at
    _check_ends(ends, lost, begins, data, stream)
    return output


def _together(output: NDArray[Any]) -> Iterator[tuple[NDArray[Any], slice]]:
    """Cut the output into runs of whole chunks, a row each, to be decoded side by side; the last may be shorter."""
    whole = len(output) // CHUNK
    for first in range(0, whole, LANES):
        last = min(first + LANES, whole)
        yield output[first * CHUNK : last * CHUNK].reshape(-1, CHUNK), slice(first, last)
    if len(output) % CHUNK:
        yield output[whole * CHUNK :].reshape(1, -1), slice(whole, whole + 1)


def _check_ends(ends: NDArray[np.int64], lost: bool, begins: list[int], data: memoryview, stream: Stream) -> None:
    """Demand that every chunk ended with its last code and zero padding."""
    for number, (end, after) in enumerate(zip(ends.tolist(), begins[1:], strict=True)):
        if lost or -(-end // 8) != after or (end % 8 and data[after - 1] & 0xFF >> end % 8):
            raise FormatError(
                f"indices of {stream.name!r}, chunk {number}: {after - begins[number]} bytes do not hold its indices "
                "and zero padding exactly"
            )


def _prefixes(lengths: NDArray[np.uint8], values: NDArray[Any]) -> tuple[NDArray[np.uint64], int]:
    """Make the decoding table: for the next ``width`` bits the value's bits and the length of its code."""
    width = int(lengths.max())
    order = np.lexsort((np.arange(len(lengths)), lengths))
    order = order[lengths[order] > 0]  # canonical: codes ascend, so each covers the next 2**(width - length) entries
    entries = bit_patterns(values)[order].astype(np.uint64) << np.uint64(8) | lengths[order]
    covered = np.repeat(entries, 1 << width - lengths[order].astype(np.int64))
    return np.pad(covered, (0, (1 << width) - len(covered))), width


def _split(data: memoryview, stream: Stream) -> tuple[NDArray[np.uint8], list[int]]:
    """Read the code lengths, and the byte where each chunk begins and the last ends."""
    count = -(-stream.count // CHUNK)
    table = -(-stream.codewords // 2)
    start = table + 4 * count
    if len(data) < start:
        raise FormatError(f"indices of {stream.name!r}: {len(data)} bytes, expected {start} of tables at least")
    lengths = np.frombuffer(data[:table], np.uint8)
    lengths = np.stack([lengths & 15, lengths >> 4], 1).reshape(-1)
    _check_lengths(lengths, stream)
    ends = start + np.cumsum(np.frombuffer(data[table:start], "<u4").astype(np.int64))
    if ends[-1] != len(data):
        raise FormatError(f"indices of {stream.name!r}: chunks end at byte {ends[-1]}, expected {len(data)}")
    return lengths[: stream.codewords], [start, *ends.tolist()]


def _check_lengths(lengths: NDArray[np.uint8], stream: Stream) -> None:
    """Demand a complete code: an over-subscribed or incomplete one decodes to nonsense without complaint."""
    if lengths[stream.codewords :].any():
        raise FormatError(f"indices of {stream.name!r}: code length given for more than {stream.codewords} codewords")
    used = lengths[lengths > 0].astype(np.int64)
    if len(used) == 1 and used[0] == 1:
        return
    kraft = int((1 << LIMIT - used).sum())
    if kraft != 1 << LIMIT:
        fault = "over-subscribed" if kraft > 1 << LIMIT else "incomplete"
        raise FormatError(f"indices of {stream.name!r}: {fault} code, Kraft sum {kraft / (1 << LIMIT):.6g}, expected 1")
