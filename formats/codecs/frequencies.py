"""The integer frequencies of rANS: chosen from a histogram, written and read.

The same histogram must give the same frequencies on every machine, else the same content would give different bytes.
The platform's logarithm differs in its last bit between machines, so code lengths come from a table that is computed
with integers.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressor.formats.codecs.kernels import bit_patterns
from compressor.formats.errors import FormatError

__all__ = [
    "FRACTION",
    "PRECISIONS",
    "choose_frequencies",
    "code_lengths",
    "decoding_table",
    "estimated_lengths",
    "fixed_log2",
    "quantise_histogram",
    "read_frequencies",
    "write_frequencies",
]

PRECISIONS = range(8, 17)
"""Values of the precision P for two or more used codewords; frequencies sum to 2**P."""

FRACTION = 24
"""Bits after the binary point of logarithms and code lengths."""

_MAX_BITS = 15  # bits of a frequency, so that their number takes 4 bits
_TOLERANCE = 20_000  # a larger, slower decoding table must save more than one byte in this many


def choose_frequencies(histogram: NDArray[np.int64]) -> tuple[int, NDArray[np.int64], int]:
    """Returns the precision and frequencies with about the fewest bytes for a histogram.

    Of all precisions whose size is within one part in 20,000 of the smallest, the lowest is chosen.

    Args:
        histogram: int64[K], how often each codeword occurs; not all 0.

    Returns:
        The precision P, 0 where one codeword alone occurs; int64[K] that sum to 2**P; and the estimated size in bytes
        of frequencies and coded indices, 0 where one codeword alone occurs.

    >>> precision, frequencies, size = choose_frequencies(np.array([700, 0, 290, 10]))
    >>> precision, frequencies.tolist(), size
    (8, [179, 0, 74, 3], 123)
    """
    used = int(np.count_nonzero(histogram))
    if used == 1:
        return 0, (histogram > 0).astype(np.int64), 0
    choices: list[tuple[int, NDArray[np.int64], int]] = []
    for precision in PRECISIONS:
        if used > 1 << precision:
            continue
        frequencies = quantise_histogram(histogram, precision)
        if frequencies.max() >> _MAX_BITS:
            continue
        bits = int((histogram * code_lengths(frequencies, precision)).sum())
        choices.append((precision, frequencies, -(-bits >> FRACTION + 3) + _table_size(frequencies)))
    least = min(size for _, _, size in choices)  # never empty: the lowest precision always fits
    return next(choice for choice in choices if _TOLERANCE * choice[2] <= (_TOLERANCE + 1) * least)


def code_lengths(frequencies: NDArray[np.int64], precision: int) -> NDArray[np.int64]:
    """Returns the code length of each codeword, int64[K] in units of 2**-FRACTION bits; 0 for a frequency of 0.

    Args:
        frequencies: int64[K] that sum to 2**``precision``.
        precision: the precision P; a codeword of frequency f takes P - log2 f bits.
    """
    return np.where(frequencies > 0, (precision << FRACTION) - _logarithms()[frequencies], 0)


def estimated_lengths(histogram: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns the bits of each codeword at the chosen frequencies; 32, a whole state, where the frequency is 0."""
    if not histogram.any():
        return np.full(len(histogram), 32.0)
    precision, frequencies, _ = choose_frequencies(histogram)
    return np.where(frequencies > 0, code_lengths(frequencies, precision) / (1 << FRACTION), 32.0)


@functools.cache
def _logarithms() -> NDArray[np.int64]:
    """Returns log2 of 0 (as 0) to 2**_MAX_BITS, int64 in units of 2**-FRACTION, rounded down.

    Each bit of the fraction comes from one squaring of the mantissa: it is 1 where the square is 2 or more.
    """
    numbers = np.maximum(np.arange((1 << _MAX_BITS) + 1), 1)
    logarithms = _bit_lengths(numbers).astype(np.uint64) - np.uint64(1)  # the integer parts
    mantissas = numbers.astype(np.uint64) << np.uint64(31) - logarithms  # 1 to 2, in units of 2**-31
    for _ in range(FRACTION):
        mantissas = mantissas * mantissas >> np.uint64(31)
        carry = mantissas >> np.uint64(32)
        mantissas >>= carry
        logarithms = logarithms << np.uint64(1) | carry
    return logarithms.astype(np.int64)


def fixed_log2(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns logarithms to base 2, int64 in units of 2**-FRACTION, to one part in 2**28: alike on every machine.

    Args:
        numbers: int64[...], from 1 to 2**52. Between those of _MAX_BITS bits the logarithm is taken for a line.

    >>> (fixed_log2(np.array([1, 2, 1 << 40])) / (1 << FRACTION)).tolist()
    [0.0, 1.0, 40.0]
    """
    shift = np.maximum(_bit_lengths(numbers).astype(np.int64) - _MAX_BITS, 0)
    leading, table = numbers >> shift, _logarithms()
    below, above = table[leading], table[leading + 1]
    rest: NDArray[np.int64] = (above - below) * (numbers - (leading << shift)) >> shift
    logarithms: NDArray[np.int64] = below + rest + (shift << FRACTION)
    return logarithms


def quantise_histogram(histogram: NDArray[np.int64], precision: int) -> NDArray[np.int64]:
    """Returns frequencies near those with the smallest code length.

    Rounds the shares, then moves slots one at a time to where they gain most, until the sum is right.

    Args:
        histogram: int64[K], how often each codeword occurs; not all 0.
        precision: the precision P; at most 2**P codewords occur.

    Returns:
        int64[K] that sum to 2**P, at least 1 where the codeword occurs, else 0.

    >>> quantise_histogram(np.array([70, 0, 29, 1]), 4).tolist()
    [11, 0, 4, 1]
    """
    total = 1 << precision
    shares = histogram * (total / histogram.sum())
    frequencies = np.where(histogram > 0, np.maximum(1, np.floor(shares + 0.5)), 0).astype(np.int64)
    while excess := int(frequencies.sum()) - total:
        # One slot more saves, and one fewer costs, about count / frequency bits. Division rounds alike on all machines;
        # the exact gain needs logarithms, which do not.
        step = -1 if excess > 0 else 1
        able = frequencies > 1 if step < 0 else histogram > 0
        gain = np.where(able, step * histogram / (frequencies + 0.5 * step), -np.inf)
        chosen = np.argsort(-gain, kind="stable")[: min(abs(excess), max(1, int(able.sum()) // 8))]
        frequencies[chosen] += step
    return frequencies


def _bit_lengths(frequencies: NDArray[np.int64]) -> NDArray[np.uint8]:
    return np.frexp(frequencies.astype(np.float64))[1].astype(np.uint8)


def _table_size(frequencies: NDArray[np.int64]) -> int:
    """Returns the number of bytes that ``write_frequencies`` returns."""
    below = np.maximum(_bit_lengths(frequencies).astype(np.int64) - 1, 0)
    return -(-len(frequencies) // 2) - (-int(below.sum()) // 8)


def write_frequencies(frequencies: NDArray[np.int64]) -> bytes:
    """Returns frequencies as bytes: the bit length of each in 4 bits, low half first, then the bits below the highest.

    Args:
        frequencies: int64[K], each below 2**15.

    >>> write_frequencies(np.array([10, 0, 5, 1])).hex()
    '04130a'
    """
    lengths = _bit_lengths(frequencies)
    padded = np.append(lengths, np.uint8(0)) if len(lengths) % 2 else lengths
    owner, position = _bits_below_highest(lengths)
    bits = (frequencies[owner] >> position & 1).astype(np.uint8)
    return (padded[::2] | padded[1::2] << 4).tobytes() + np.packbits(bits, bitorder="little").tobytes()


def read_frequencies(data: memoryview, codewords: int, precision: int, what: str) -> tuple[NDArray[np.int64], int]:
    """Returns the frequencies at the beginning of ``data``, and the number of bytes they take.

    Args:
        data: at least the bytes of ``write_frequencies``.
        codewords: their number K.
        precision: the precision P.
        what: what messages call the stream.

    Raises:
        FormatError: the frequencies are incomplete, their padding is set, or they do not sum to 2**P.
    """
    end = -(-codewords // 2)
    halves = np.frombuffer(data[:end], np.uint8)
    lengths = np.stack([halves & 15, halves >> 4], 1).reshape(-1)
    if len(halves) != end or lengths[codewords:].any():
        raise FormatError(f"{what}: the table of frequencies is cut, or has more than {codewords}")
    owner, position = _bits_below_highest(lengths[:codewords])
    size = end + -(-len(owner) // 8)
    bits = np.unpackbits(np.frombuffer(data[end:size], np.uint8), bitorder="little")
    if len(bits) < len(owner) or bits[len(owner) :].any():
        raise FormatError(f"{what}: the table of frequencies is cut, or its padding is not zero")
    frequencies = np.where(lengths[:codewords] > 0, 1 << np.maximum(lengths[:codewords].astype(np.int64) - 1, 0), 0)
    np.add.at(frequencies, owner, bits[: len(owner)].astype(np.int64) << position)
    if frequencies.sum() != 1 << precision:
        raise FormatError(f"{what}: frequencies sum to {frequencies.sum()}, expected {1 << precision}")
    return frequencies, size


def _bits_below_highest(lengths: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns, for each stored bit, the frequency it belongs to and its position in that, lowest first."""
    below = np.maximum(lengths.astype(np.int64) - 1, 0)
    owner = np.repeat(np.arange(len(lengths)), below)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(below) - below, below)


def decoding_table(frequencies: NDArray[np.int64], values: NDArray[Any]) -> NDArray[np.uint64]:
    """Returns the tables of ``rans_decode`` one after the other, uint64[T * 2**P].

    An entry holds the frequency of the slot's owner, the position of the slot among its slots, and its value's bits.

    Args:
        frequencies: int64[T, K], each row sums to 2**P; int64[K] for one table.
        values: the value of each of the K codewords.
    """
    flat = frequencies.reshape(-1)
    ends = np.cumsum(flat)
    owners = ((frequencies << 48) + bit_patterns(values)).reshape(-1)
    owners -= ends - flat << 32  # the position that their first slot adds
    slots: NDArray[np.int64] = np.arange(ends[-1]) << 32
    slots += np.repeat(owners, flat)
    return slots.view(np.uint64)
