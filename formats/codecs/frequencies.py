"""The integer frequencies of rANS: chosen from a histogram, stored, read.

The same histogram must give the same frequencies on every machine, or the same content would give other bytes. So
nothing here asks for a logarithm of the platform, whose last bit differs between machines: code lengths come from a
table made of whole numbers.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from compressor.formats.errors import FormatError

__all__ = [
    "FRACTION",
    "PRECISIONS",
    "choose_frequencies",
    "code_lengths",
    "quantise_histogram",
    "read_frequencies",
    "write_frequencies",
]

PRECISIONS = range(8, 17)
LENGTHS = 15  # most bits of a frequency: its length takes 4
FRACTION = 24  # bits after the point of a logarithm
WORTH = 20_000  # a larger decoding table is slower: it must save more than one byte in so many


def choose_frequencies(histogram: NDArray[np.int64]) -> tuple[int, NDArray[np.int64], int]:
    """Give precision, frequencies and bytes: of all precisions near the fewest bytes the lowest; 0 for one codeword.

    >>> precision, frequencies, size = choose_frequencies(np.array([700, 0, 290, 10]))
    >>> precision, frequencies.tolist(), size
    (8, [179, 0, 74, 3], 123)
    """
    used = int(np.count_nonzero(histogram))
    if used == 1:
        return 0, (histogram > 0).astype(np.int64), 0
    found: list[tuple[int, NDArray[np.int64], int]] = []
    for precision in PRECISIONS:
        if used > 1 << precision:
            continue
        frequencies = quantise_histogram(histogram, precision)
        if frequencies.max() >> LENGTHS:
            continue
        bits = int((histogram * code_lengths(frequencies, precision)).sum())
        found.append((precision, frequencies, -(-bits >> FRACTION + 3) + _table_size(frequencies)))
    least = min(size for _, _, size in found)  # of two used codewords one may have 2**8 - 1 slots: one is found
    return next(choice for choice in found if WORTH * choice[2] <= (WORTH + 1) * least)


def code_lengths(frequencies: NDArray[np.int64], precision: int) -> NDArray[np.int64]:
    """Give the bits of each codeword in units of 2**-FRACTION; 0 where it has no frequency."""
    return np.where(frequencies > 0, (precision << FRACTION) - _logarithms()[frequencies], 0)


@functools.cache
def _logarithms() -> NDArray[np.int64]:
    """Give log2 of 0 (as 0) to 2**LENGTHS - 1 in units of 2**-FRACTION, rounded down, by squaring whole numbers."""
    numbers = np.maximum(np.arange(1 << LENGTHS), 1)
    whole = _bit_lengths(numbers).astype(np.uint64) - np.uint64(1)
    mantissas = numbers.astype(np.uint64) << np.uint64(31) - whole  # 1 to 2, in units of 2**-31
    logarithms = whole
    for _ in range(FRACTION):
        mantissas = mantissas * mantissas >> np.uint64(31)
        carry = mantissas >> np.uint64(32)
        mantissas >>= carry
        logarithms = logarithms << np.uint64(1) | carry
    return logarithms.astype(np.int64)


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
