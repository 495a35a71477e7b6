"""Canonical Huffman: its lengths are the best there are, and its tables cannot lie."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from bitarray.util import canonical_huffman

from compressor.formats.codecs.base import Stream
from compressor.formats.codecs.huffman import Huffman
from compressor.formats.codecs.prefix_codes import LIMIT, code_table, limited_lengths, package_merge
from compressor.formats.errors import FormatError

FIBONACCI = [1, 1]
while len(FIBONACCI) < 30:
    FIBONACCI.append(FIBONACCI[-1] + FIBONACCI[-2])


def stream(count: int, codewords: int) -> Stream:
    return Stream("fc.weight", count, codewords)


def forged(lengths: list[int], chunk: bytes) -> memoryview:
    """Make a one-chunk stream with any code lengths."""
    padded = [*lengths, 0]
    table = bytes(padded[i] | padded[i + 1] << 4 for i in range(0, len(lengths), 2))
    return memoryview(table + struct.pack("<I", len(chunk)) + chunk)


def test_lengths_are_limited_and_complete() -> None:
    lengths = limited_lengths(np.array(FIBONACCI))
    assert lengths.max() == LIMIT
    assert sum(2.0 ** -int(length) for length in lengths) == 1.0


def test_the_first_code_that_would_be_too_long() -> None:
    """Of 17 Fibonacci counts the longest code would have 16 bits, all together 10,925; within 15, 10,926."""
    assert sorted(limited_lengths(np.array(FIBONACCI[:16])).tolist()) == [*range(1, 16), 15]
    lengths = limited_lengths(np.array(FIBONACCI[:17])).tolist()
    assert max(lengths) == 15
    assert sum(2 ** (15 - length) for length in lengths) == 32768
    assert sum(count * length for count, length in zip(FIBONACCI[:17], lengths, strict=True)) == 10_926


def test_a_stream_with_the_first_code_that_would_be_too_long() -> None:
    indices = np.repeat(np.arange(17), FIBONACCI[:17]).astype(np.uint8)
    data = Huffman().encode(indices, stream(len(indices), 17))
    assert np.array_equal(Huffman().decode(memoryview(data), stream(len(indices), 17)), indices)


def test_package_merge_costs_what_huffman_costs_where_the_limit_is_loose() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        counts = np.sort(rng.integers(1, 1000, rng.integers(2, 60)))
        unlimited = limited_lengths(counts)
        assert int((counts * unlimited).sum()) == int((counts * package_merge(counts)).sum())


def test_codes_are_canonical() -> None:
    codes = code_table(limited_lengths(np.array([50, 3, 0, 20, 20, 1])))
    ordered = sorted(codes, key=lambda symbol: (len(codes[symbol]), symbol))
    texts = [codes[symbol].to01() for symbol in ordered]
    assert texts == sorted(texts)
    assert not any(later.startswith(earlier) for earlier in texts for later in texts if earlier != later)


def test_size_of_a_known_stream() -> None:
    data = Huffman().encode(np.array([0, 0, 0, 1, 2], np.uint8), stream(5, 3))
    assert data == bytes([0x21, 0x02]) + struct.pack("<I", 1) + bytes([0b00010110])


@pytest.mark.parametrize(
    ("lengths", "fault"),
    [([1, 1, 1, 0], "over-subscribed"), ([0, 2, 2, 2], "incomplete"), ([1, 2, 0, 0], "incomplete"),
     ([0, 0, 0, 0], "incomplete"), ([2, 0, 0, 0], "incomplete"), ([15] * 4, "incomplete")],
)  # fmt: skip
def test_codes_that_are_not_complete_are_refused(lengths: list[int], fault: str) -> None:
    with pytest.raises(FormatError, match=fault):
        Huffman().decode(forged(lengths, b"\0"), stream(4, 4))


def test_length_beyond_the_codewords_is_refused() -> None:
    with pytest.raises(FormatError, match="more than 3 codewords"):
        Huffman().decode(forged([1, 2, 0, 2], b"\0"), stream(3, 3))


def test_set_padding_bits_are_refused() -> None:
    with pytest.raises(FormatError, match="zero padding"):
        Huffman().decode(forged([1, 1], b"\x01"), stream(4, 2))


def test_a_chunk_with_more_indices_is_refused() -> None:
    with pytest.raises(FormatError, match="chunk 0"):
        Huffman().decode(forged([1, 1], b"\0\0"), stream(4, 2))


def test_a_chunk_with_fewer_indices_is_refused() -> None:
    with pytest.raises(FormatError, match="chunk 0"):
        Huffman().decode(forged([2, 2, 2, 2], b"\x1b"), stream(5, 4))


def test_the_second_code_of_a_lone_codeword_is_refused() -> None:
    with pytest.raises(FormatError, match="chunk 0"):
        Huffman().decode(forged([1, 0], b"\x20"), stream(8, 2))


def test_bitarray_still_builds_codes_of_any_length() -> None:
    """Fails when bitarray limits its codes: package-merge can then go, if the limit is 15."""
    _, counts, _ = canonical_huffman(dict(enumerate(FIBONACCI + [FIBONACCI[-1] * 2**i for i in range(1, 10)])))
    assert len(counts) > 32
