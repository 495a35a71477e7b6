"""Optimal prefix codes of limited length, in canonical form, for what is coded by them and what compresses metadata.

Codes that would be longer than 15 bits are limited by package-merge: Larmore and Hirschberg, "A Fast Algorithm for
Optimal Length-Limited Huffman Codes", 1990.
"""

from __future__ import annotations

import numpy as np
from bitarray import bitarray
from bitarray.util import canonical_huffman
from numpy.typing import NDArray

__all__ = ["LIMIT", "code_table", "limited_lengths", "package_merge"]

LIMIT = 15
"""Bits of the longest code, so that a length takes 4 bits and a decoding table at most 2**15 entries."""


def limited_lengths(histogram: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Returns the lengths of the optimal code in which none is longer than LIMIT.

    Args:
        histogram: int64[K], how often each codeword occurs; K is at most 2**LIMIT.

    Returns:
        uint8[K], 0 for codewords that do not occur.

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
    """Returns the optimal code lengths up to LIMIT by package-merge.

    Each of LIMIT rounds pairs the cheapest of all symbols and of the packages of the last round into new packages. The
    length of a symbol is how often it occurs in the first n - 1 packages of the last round.

    Args:
        counts: int64[n], how often each symbol occurs, none 0; n is from 2 to 2**LIMIT.

    Returns:
        uint8[n].

    >>> package_merge(np.array([5, 2, 1])).tolist()
    [1, 2, 2]
    """
    leaves = [(int(count), (symbol,)) for symbol, count in enumerate(counts)]
    packages: list[tuple[int, tuple[int, ...]]] = []
    for _ in range(LIMIT):
        ascending = sorted(leaves + packages)
        pairs = zip(ascending[::2], ascending[1::2], strict=False)
        packages = [(one[0] + two[0], one[1] + two[1]) for one, two in pairs]
    chosen = [symbol for _, symbols in packages[: len(counts) - 1] for symbol in symbols]
    return np.bincount(chosen, minlength=len(counts)).astype(np.uint8)


def code_table(lengths: NDArray[np.uint8]) -> dict[int, bitarray]:
    """Returns the canonical code of each codeword that has a length.

    In the order of (length, index) each code is the one before plus 1, shifted left where it is longer; the first is 0.

    Args:
        lengths: uint8[K], 0 for codewords without a code.

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
