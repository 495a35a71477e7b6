"""Numbers as bits: the code by hand, its length, and what is cut or out of range."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.formats.codecs.bit_text import BitReader, golomb, golomb_bits, to_bytes
from compressor.formats.errors import FormatError


def test_codes_worked_by_hand() -> None:
    """Order 0: 1, 010, 011, 00100; order 2: the two lowest bits follow as they are."""
    assert [golomb(number, 0) for number in range(4)] == ["1", "010", "011", "00100"]
    assert [golomb(number, 2) for number in (0, 3, 4, 11, 12)] == ["100", "111", "01000", "01111", "0010000"]


@given(st.lists(st.integers(0, 1 << 20)), st.integers(0, 3), st.integers(0, 30))
def test_what_is_written_is_read(numbers: list[int], order: int, first: int) -> None:
    text = f"{first:05b}" + "".join(golomb(number, order) for number in numbers)
    assert golomb_bits(np.array(numbers, np.int64), order).sum() == len(text) - 5
    data = to_bytes(text)
    reader = BitReader(memoryview(data + b"\xff" * 3))
    assert reader.number(5) == first
    assert reader.golombs(len(numbers), order) == numbers
    assert reader.finish() == len(data)


def test_bytes_are_turned_into_text_as_they_are_needed() -> None:
    """A number of zero bits, then more numbers than one block holds."""
    numbers = [number % 50 for number in range(5_000)]
    reader = BitReader(memoryview(to_bytes("".join(golomb(number, 1) for number in numbers))))
    assert reader.number(0) == 0
    assert [*reader.golombs(2_000, 1), *reader.golombs(3_000, 1)] == numbers


@pytest.mark.parametrize("cut", range(3))
def test_every_cut_is_found(cut: int) -> None:
    data = to_bytes(golomb(1000, 0) + "0000")
    with pytest.raises(FormatError, match="is cut"):
        BitReader(memoryview(data[:cut])).golombs(1, 0)
    with pytest.raises(FormatError, match="is cut"):
        BitReader(memoryview(data[:cut])).number(8 * cut + 1)


def test_at_most_24_zeros() -> None:
    longest = "0" * 24 + "1" + "0" * 24
    assert BitReader(memoryview(to_bytes(longest))).golombs(1, 0) == [(1 << 24) - 1]
    with pytest.raises(FormatError, match="out of range"):
        BitReader(memoryview(to_bytes("0" + longest + "0"))).golombs(1, 0)
    with pytest.raises(FormatError, match="out of range"):
        BitReader(memoryview(bytes(1000))).golombs(1, 0)


def test_padding_must_be_zero() -> None:
    reader = BitReader(memoryview(b"\xf8"))
    reader.number(4)
    with pytest.raises(FormatError, match="padding"):
        reader.finish()
    reader.number(1)
    assert reader.finish() == 1
