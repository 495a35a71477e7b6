"""Fixed-width packing against an obvious twin, and the ways its bytes can lie."""

from __future__ import annotations

import numpy as np
import pytest

from compressor.formats.codecs.base import Stream
from compressor.formats.codecs.bitpacking import pack_bits, take, unpack_bits
from compressor.formats.codecs.bits import Bits
from compressor.formats.errors import FormatError


def slow_pack(indices: list[int], width: int) -> bytes:
    number = sum(index << (position * width) for position, index in enumerate(indices))
    return number.to_bytes(-(-len(indices) * width // 8), "little")


@pytest.mark.parametrize("width", range(21))
@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 64, 101])
def test_packing_is_one_long_little_endian_number(width: int, count: int) -> None:
    indices = np.random.default_rng(width).integers(0, 1 << width, count).astype(np.uint32)
    data = pack_bits(indices, width)
    assert data == slow_pack(indices.tolist(), width)
    if width:
        np.testing.assert_array_equal(unpack_bits(data, count, width), indices)


@pytest.mark.parametrize("count", [0, 1, (1 << 15) - 1, 1 << 15, 100_001])
def test_gathering_in_pieces_is_indexing(count: int) -> None:
    random = np.random.default_rng(count)
    values, places = random.normal(size=200).astype(np.float32), random.integers(0, 200, count).astype(np.uint8)
    np.testing.assert_array_equal(take(values, places), values[places])
    np.testing.assert_array_equal(take(values.view("V8"), places // 2), values.view("V8")[places // 2])


def test_index_of_no_codeword_is_named() -> None:
    with pytest.raises(FormatError, match="index 7 at position 2, expected less than 5"):
        Bits().decode(memoryview(pack_bits(np.array([1, 4, 7]), 3)), Stream("fc.weight", 3, 5))


def test_index_of_no_codeword_is_refused_in_lookup() -> None:
    with pytest.raises(FormatError, match="index 3 at position 0"):
        Bits().lookup(memoryview(b"\x03"), Stream("fc.weight", 1, 3), np.zeros(3, np.float32))


@pytest.mark.parametrize("codewords", [16, 8])
def test_padding_must_be_zero(codewords: int) -> None:
    data = bytearray(pack_bits(np.array([1, 2, 3]), (codewords - 1).bit_length()))
    data[-1] |= 0x80
    with pytest.raises(FormatError, match="padding"):
        Bits().decode(memoryview(data), Stream("fc.weight", 3, codewords))


def test_size_is_exact() -> None:
    with pytest.raises(FormatError, match="2 bytes, expected 3 for 5 indices of 4 bits"):
        Bits().decode(memoryview(b"\0\0"), Stream("fc.weight", 5, 16))


def test_one_codeword_takes_no_bytes() -> None:
    assert Bits().encode(np.zeros(1000, np.uint8), Stream("fc.weight", 1000, 1)) == b""
