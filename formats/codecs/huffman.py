"""Canonical Huffman coding: short codes for frequent indices.

Huffman, "A Method for the Construction of Minimum-Redundancy Codes", 1952.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from bitarray import bitarray
from numpy.typing import NDArray

from compressor.formats.codecs.base import Codec, Stream
from compressor.formats.codecs.kernels import PADDING, bit_patterns, huffman_decode
from compressor.formats.codecs.prefix_codes import LIMIT, code_table, limited_lengths
from compressor.formats.codecs.registry import register
from compressor.formats.content import index_dtype
from compressor.formats.errors import FormatError
from compressor.formats.io.huge_pages import allocate

__all__ = ["CHUNK", "Huffman"]

CHUNK = 1 << 16
"""Indices in a chunk, which begins on a byte and can be decoded on its own."""

LANES = 4
"""Chunks decoded side by side, so that the processor need not wait for the table lookup of one of them."""


@register
@dataclass(frozen=True)
class Huffman(Codec):
    """Stores the code lengths (4 bits a codeword, low half first), the chunk sizes (u32), then the chunks.

    A chunk holds the codes of its indices, first bit highest, padded with zeros to a byte. Where only one codeword
    occurs, its code is the single bit 0. A stream of no indices is empty.
    """

    id: ClassVar[str] = "huffman"
    max_codewords: ClassVar[int] = 1 << LIMIT

    def encode(self, indices: NDArray[Any], stream: Stream) -> bytes:
        """Returns the indices coded with the optimal code for their histogram."""
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
        """Returns the indices; FormatError unless code lengths, chunk sizes and padding are all valid."""
        return _decode(data, stream, np.arange(stream.codewords, dtype=index_dtype(stream.codewords)))

    def lookup(self, data: memoryview, stream: Stream, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns the values of the indices, from a decoding table that holds values instead of indices."""
        return _decode(data, stream, values)

    def code_lengths(self, histogram: NDArray[np.int64]) -> NDArray[np.float64]:
        """Returns the lengths of the optimal code for ``histogram``; LIMIT for codewords that do not occur."""
        lengths = limited_lengths(histogram)
        return np.where(lengths > 0, lengths, LIMIT).astype(np.float64)

    def max_count(self, size: int, codewords: int) -> int | None:
        """Returns the number of bits: a code has one at least."""
        return 8 * size


def _decode(data: memoryview, stream: Stream, values: NDArray[Any]) -> NDArray[Any]:
    """Returns the value of each index of a stream, of the dtype of ``values``[K]."""
    output = allocate(stream.count, values.dtype)
    if not stream.count:
        if len(data):
            raise FormatError(f"indices of {stream.name!r}: {len(data)} bytes for no indices, expected none")
        return output
    lengths, starts = _split(data, stream)
    table, width = _decoding_table(lengths, values)
    coded = np.concatenate([np.frombuffer(data, np.uint8), np.zeros(PADDING, np.uint8)])
    bit_positions = np.array(starts[:-1], np.int64) * 8
    invalid = False
    for rows, chunks in _chunk_rows(bit_patterns(output)):
        positions = bit_positions[chunks]
        invalid |= bool(huffman_decode(rows, positions, table, coded, width))
        bit_positions[chunks] = positions
    _check_ends(bit_positions, invalid, starts, data, stream)
    return output


def _chunk_rows(output: NDArray[Any]) -> Iterator[tuple[NDArray[Any], slice]]:
    """Yields up to LANES chunks at a time, as rows of the output, and their numbers; a last, shorter chunk alone."""
    complete = len(output) // CHUNK
    for first in range(0, complete, LANES):
        last = min(first + LANES, complete)
        yield output[first * CHUNK : last * CHUNK].reshape(-1, CHUNK), slice(first, last)
    if len(output) % CHUNK:
        yield output[complete * CHUNK :].reshape(1, -1), slice(complete, complete + 1)


def _check_ends(ends: NDArray[np.int64], invalid: bool, starts: list[int], data: memoryview, stream: Stream) -> None:
    """Checks that each chunk ends, in bits, with its last code and zero padding up to the byte of the next chunk."""
    for number, (end, next_start) in enumerate(zip(ends.tolist(), starts[1:], strict=True)):
        if invalid or -(-end // 8) != next_start or (end % 8 and data[next_start - 1] & 0xFF >> end % 8):
            raise FormatError(
                f"indices of {stream.name!r}, chunk {number}: {next_start - starts[number]} bytes do not hold its "
                "indices and zero padding exactly"
            )


def _decoding_table(lengths: NDArray[np.uint8], values: NDArray[Any]) -> tuple[NDArray[np.uint64], int]:
    """Returns the table of ``huffman_decode``, uint64[2**width], and its width, the length of the longest code.

    Canonical codes ascend in the order of (length, index), so a code of length l fills the next 2**(width - l) entries.
    """
    width = int(lengths.max())
    order = np.lexsort((np.arange(len(lengths)), lengths))
    order = order[lengths[order] > 0]
    entries = bit_patterns(values)[order].astype(np.uint64) << np.uint64(8) | lengths[order]
    table = np.repeat(entries, 1 << width - lengths[order].astype(np.int64))
    return np.pad(table, (0, (1 << width) - len(table))), width


def _split(data: memoryview, stream: Stream) -> tuple[NDArray[np.uint8], list[int]]:
    """Returns the code lengths, uint8[K], and the byte at which each chunk starts, followed by the end of the last."""
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
    """Checks that the code is complete (Kraft sum 1), or one code of one bit; other codes would decode to nonsense."""
    if lengths[stream.codewords :].any():
        raise FormatError(f"indices of {stream.name!r}: code length given for more than {stream.codewords} codewords")
    used = lengths[lengths > 0].astype(np.int64)
    if len(used) == 1 and used[0] == 1:
        return
    kraft = int((1 << LIMIT - used).sum())
    if kraft != 1 << LIMIT:
        fault = "over-subscribed" if kraft > 1 << LIMIT else "incomplete"
        raise FormatError(f"indices of {stream.name!r}: {fault} code, Kraft sum {kraft / (1 << LIMIT):.6g}, expected 1")
