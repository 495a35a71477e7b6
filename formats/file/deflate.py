"""Deflated metadata: raw deflate (RFC 1951) with a dictionary of names and words that metadata often hold (SPEC.md, 2).

Inflating is left to zlib. Deflating is not: the releases of zlib, and libraries that stand in for it, compress the same
text to different bytes, and the same weights are to give the same file on every machine. This one also finds shorter
bytes, since it chooses among all matches by what they cost: Alakuijala, Vandevenne, "Data compression using Zopfli",
2013.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from bitarray import bitarray
from bitarray.util import int2ba
from numpy.typing import NDArray

from compressor.formats.codecs.prefix_codes import code_table, limited_lengths
from compressor.formats.errors import FormatError

__all__ = ["DICTIONARY", "deflate", "inflate"]

DICTIONARY = b"".join((Path(__file__).parents[1] / "dictionary.txt").read_bytes().splitlines())
"""What deflated data may refer to, as if it stood before them. A part of the format: it can never be changed."""

_WINDOW = 1 << 15  # bytes that a match may reach back
_SHORTEST, _LONGEST = 3, 258  # bytes of a match
_ENOUGH = 64  # bytes of a match from which on shorter ones are not tried
_TRIED = 48  # places compared for each byte, the nearest first
_ROUNDS = 3  # in which codes are made for the matches chosen, and matches chosen by these codes
_ABSENT = 13.0  # bits that a symbol without a code is taken to cost
_END = 256  # the symbol that ends a block
_LENGTHS = [*range(3, 11), *range(11, 19, 2), *range(19, 35, 4), *range(35, 67, 8), *range(67, 131, 16), 131, 163, 195]
_LENGTHS += [227, 258]  # the shortest match of each symbol from 257 on
_LENGTH_BITS = [0] * 8 + [bits for bits in range(1, 6) for _ in range(4)] + [0]
_DISTANCES = [1, 2, 3, 4] + [(2 + odd << bits) + 1 for bits in range(1, 14) for odd in (0, 1)]
_DISTANCE_BITS = [0, 0, 0, 0] + [bits for bits in range(1, 14) for _ in (0, 1)]
_ORDER = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15)  # in which lengths of lengths are stored
_FIXED = (
    np.repeat([8, 9, 7, 8], [144, 112, 24, 8]).astype(np.uint8),
    np.full(30, 5, np.uint8),
)  # the code lengths of a block that stores none

Token = tuple[int, int]
"""A match, as its length and distance; or a byte, as (byte, 0)."""
Codes = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""The code lengths of bytes and lengths, and of distances."""


def inflate(data: bytes, size: int) -> bytes:
    """Returns what deflated data hold, without ever holding more than ``size`` bytes of it.

    Args:
        data: a raw deflate stream.
        size: the number of bytes that it is said to inflate to.

    Raises:
        FormatError: it is no such stream, holds more or less, or does not end where the data end.
    """
    stream = zlib.decompressobj(-15, zdict=DICTIONARY)
    try:
        text = stream.decompress(data, size + 1)  # one more, so that the end of the stream is read too
    except zlib.error as error:
        raise FormatError(f"metadata: not a deflate stream ({error})") from error
    if len(text) != size or not stream.eof or stream.unused_data or stream.unconsumed_tail:
        raise FormatError(f"metadata: the deflate stream does not hold exactly the {size:,} bytes declared")
    return text


def deflate(text: bytes) -> bytes:
    """Returns a raw deflate stream of a text: the same bytes on every machine.

    >>> inflate(deflate(b'{"version":2}'), 13)
    b'{"version":2}'
    """
    data, start = DICTIONARY + text, len(DICTIONARY)
    matches = _matches(data, start)
    codes, blocks = _FIXED, []
    for _ in range(_ROUNDS):
        tokens = _cheapest(data, start, matches, codes)
        blocks.append(_block(tokens, _FIXED, _bits(0b011, 3)))  # the last block, with fixed codes
        codes = _optimal(tokens)
        blocks.append(_block(tokens, codes, _bits(0b101, 3) + _stored(codes)))
    return min(blocks, key=len)


def _matches(data: bytes, start: int) -> list[list[Token]]:
    """Returns for each byte from ``start`` on the matches that begin there: of each length the nearest."""
    places: dict[bytes, list[int]] = {}
    matches: list[list[Token]] = []
    for at in range(len(data) - _SHORTEST + 1):
        here = places.setdefault(data[at : at + _SHORTEST], [])
        if at >= start:
            matches.append(_matches_at(data, at, here))
        here.append(at)
    return matches + [[] for _ in range(max(start, len(data) - _SHORTEST + 1), len(data))]


def _matches_at(data: bytes, at: int, places: Sequence[int]) -> list[Token]:
    found: list[Token] = []
    best, most = _SHORTEST - 1, min(_LONGEST, len(data) - at)
    for place in places[: -_TRIED - 1 : -1]:
        if at - place > _WINDOW or best == most:
            break
        if data[place : place + best + 1] == data[at : at + best + 1]:
            best += 1
            if data[place : place + most] == data[at : at + most]:  # at once, for long runs
                best = most
            while best < most and data[place + best] == data[at + best]:
                best += 1
            found.append((best, at - place))
    return found


def _cheapest(data: bytes, start: int, matches: Sequence[Sequence[Token]], codes: Codes) -> list[Token]:
    """Returns the bytes and matches that take the fewest bits with codes of these lengths."""
    symbols, distances = ([float(bits) or _ABSENT for bits in lengths.tolist()] for lengths in codes)
    of_length = [symbols[_length_symbol(length)] + _LENGTH_BITS[_length_symbol(length) - 257] for length in _ALL]
    cost = [0.0] * (len(data) - start + 1)
    chosen: list[Token] = []
    for at in range(len(data) - start - 1, -1, -1):
        byte = data[start + at]
        least, token, shortest = symbols[byte] + cost[at + 1], (byte, 0), _SHORTEST
        for longest, distance in matches[at]:
            symbol = _distance_symbol(distance)
            far = distances[symbol] + _DISTANCE_BITS[symbol]
            for length in range(longest if longest >= _ENOUGH else shortest, longest + 1):
                bits = far + of_length[length - _SHORTEST] + cost[at + length]
                if bits < least:
                    least, token = bits, (length, distance)
            shortest = longest + 1
        cost[at] = least
        chosen.append(token)
    tokens, at = [], 0
    while at < len(chosen):
        token = chosen[-1 - at]
        tokens.append(token)
        at += token[0] if token[1] else 1
    return tokens


_ALL = range(_SHORTEST, _LONGEST + 1)


def _length_symbol(length: int) -> int:
    return 256 + bisect_right(_LENGTHS, length)


def _distance_symbol(distance: int) -> int:
    return bisect_right(_DISTANCES, distance) - 1


def _optimal(tokens: Sequence[Token]) -> Codes:
    """Returns the lengths of the optimal codes for tokens."""
    symbols, distances = np.zeros(286, np.int64), np.zeros(30, np.int64)
    symbols[_END] = 1
    for token, distance in tokens:
        symbols[_length_symbol(token) if distance else token] += 1
        if distance:
            distances[_distance_symbol(distance)] += 1
    return limited_lengths(symbols), limited_lengths(distances)


def _block(tokens: Sequence[Token], codes: Codes, head: bitarray) -> bytes:
    """Returns a block of a head and coded tokens."""
    symbols, distances = map(code_table, codes)
    bits = bitarray(head, endian="little")
    for token, distance in tokens:
        if not distance:
            bits += symbols[token]
            continue
        length, far = _length_symbol(token), _distance_symbol(distance)
        bits += symbols[length] + _bits(token - _LENGTHS[length - 257], _LENGTH_BITS[length - 257])
        bits += distances[far] + _bits(distance - _DISTANCES[far], _DISTANCE_BITS[far])
    return (bits + symbols[_END]).tobytes()


def _bits(value: int, count: int) -> bitarray:
    """Returns a number in so many bits, the lowest first."""
    return int2ba(value, count, "little") if count else bitarray(endian="little")


def _stored(codes: Codes) -> bitarray:
    """Returns the code lengths as a block stores them: runs of equal ones, in a code whose own lengths come first."""
    kept = [np.trim_zeros(lengths, "b") for lengths in codes]
    counts = [max(len(lengths), least) for lengths, least in zip(kept, (257, 1), strict=True)]
    lengths = [length for one, count in zip(codes, counts, strict=True) for length in one[:count].tolist()]
    runs = [run for length, group in groupby(lengths) for run in _runs(length, len(list(group)))]
    code = _short_code([symbol for symbol, _, _ in runs])
    stored = [code[symbol] for symbol in _ORDER]
    while len(stored) > 4 and not stored[-1]:
        stored.pop()
    bits = _bits(counts[0] - 257, 5) + _bits(counts[1] - 1, 5) + _bits(len(stored) - 4, 4)
    for length in stored:
        bits += _bits(length, 3)
    table = code_table(np.array(code, np.uint8))
    for symbol, extra, count in runs:
        bits += table[symbol] + _bits(extra, count)
    return bits


def _runs(length: int, count: int) -> list[tuple[int, int, int]]:
    """Returns ``count`` equal code lengths as symbols, each with its extra bits and their number."""
    runs = [(length, 0, 0)] if length else []
    count -= len(runs)
    while count:
        if length and count >= 3:
            take, run = min(count, 6), (16, 2, 3)
        elif not length and count >= 11:
            take, run = min(count, 138), (18, 7, 11)
        elif not length and count >= 3:
            take, run = min(count, 10), (17, 3, 3)
        else:
            take, run = 1, (length, 0, 1)
        runs.append((run[0], take - run[2], run[1]))
        count -= take
    return runs


def _short_code(symbols: Sequence[int]) -> list[int]:
    """Returns the lengths of a code for the symbols of runs, none longer than 7 bits."""
    counts = np.bincount(symbols, minlength=19)
    while (lengths := limited_lengths(counts)).max() > 7:
        counts = (counts + 1) // 2
    return [int(length) for length in lengths]
