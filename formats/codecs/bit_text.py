"""Numbers of varying length as bits, first bit highest: fields of a known width, and exponential Golomb codes.

Teuhola, "A compression method for clustered bit-vectors", Information Processing Letters 7, 1978.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from compressor.formats.errors import FormatError

__all__ = ["BitReader", "fixed", "golomb", "golomb_bits", "to_bytes"]

_BLOCK = 64  # bytes that are turned into text at a time
_LONGEST = 24  # zeros before a code's first one


def fixed(number: int, width: int) -> str:
    """Returns a number in so many bits.

    >>> fixed(2, 3), fixed(0, 0)
    ('010', '')
    """
    return f"{number:0{width}b}" if width else ""


def golomb(number: int, order: int) -> str:
    """Returns the exponential Golomb code of a number.

    That is ``number + 2**order`` in binary, with as many zeros before it as it has bits above the lowest ``order + 1``.

    >>> [golomb(number, 1) for number in range(4)]
    ['10', '11', '0100', '0101']
    """
    digits = f"{number + (1 << order):b}"
    return "0" * (len(digits) - order - 1) + digits


def golomb_bits(numbers: NDArray[np.int64], order: int) -> NDArray[np.int64]:
    """Returns the length of the code of each number."""
    return 2 * np.frexp(numbers + (1 << order))[1].astype(np.int64) - order - 1


def to_bytes(bits: str) -> bytes:
    """Returns text of 0 and 1 as bytes, padded with zeros.

    >>> to_bytes("010000011").hex()
    '4180'
    """
    size = -(-len(bits) // 8)
    return int(bits.ljust(8 * size, "0") or "0", 2).to_bytes(size, "big")


class BitReader:
    """Reads the bits of bytes in order.

    Args:
        data: the bytes, of which as many are looked at as are asked for.

    Methods raise FormatError where the bits end.
    """

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._text, self._at = "", 0

    def _demand(self, end: int) -> None:
        """Makes sure that the bits before ``end`` are text."""
        if end > 8 * len(self._data):
            raise FormatError("the table of frequencies is cut")
        while len(self._text) < end:
            start = len(self._text) // 8
            block = self._data[start : start + max(_BLOCK, start)]
            self._text += bin(int.from_bytes(b"\1" + block, "big"))[3:]

    def number(self, width: int) -> int:
        """Returns a number of ``width`` bits."""
        start, self._at = self._at, self._at + width
        if self._at > len(self._text):
            self._demand(self._at)
        return int(self._text[start : self._at] or "0", 2)

    def golombs(self, count: int, order: int) -> list[int]:
        """Returns ``count`` numbers in the code of ``golomb``."""
        numbers, at = [], self._at
        for _ in range(count):
            one = self._text.find("1", at)
            if one < 0:
                self._demand(min(at + _LONGEST + 1, 8 * len(self._data)))
                one = self._text.find("1", at, at + _LONGEST + 1)
            if not 0 <= one - at <= _LONGEST:
                raise FormatError("the table of frequencies is cut, or has a number out of range")
            end = 2 * one - at + order + 1
            if end > len(self._text):
                self._demand(end)
            numbers.append(int(self._text[one:end], 2) - (1 << order))
            at = end
        self._at = at
        return numbers

    def finish(self) -> int:
        """Returns the number of bytes read; FormatError unless what is left of the last one is zeros."""
        end = -(-self._at // 8)
        self._demand(8 * end)
        if "1" in self._text[self._at : 8 * end]:
            raise FormatError("the padding of the table of frequencies is not zero")
        return end
