"""Inner loops of the codecs: compiled by numba where there is one, else the same lines as plain Python.

All arithmetic fits 63 bits, so that compiled and plain agree. Nothing here checks more than its own bounds:
what a stream may hold is checked by its codec.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["LOW", "huffman_decode", "rans_decode", "rans_encode"]

Array = NDArray[Any]

LOW = 1 << 16
"""Smallest state of a rANS lane; states stay in [LOW, LOW << 16)."""

_SMALL = 1 << 14  # below this many indices importing numba takes longer than plain Python


def kernel(function: Callable[..., int]) -> Callable[..., int]:
    """Run ``function`` compiled. Its first two arguments are arrays to write, the others arrays to read or numbers."""
    compiled: Callable[..., int] | None = None

    @functools.wraps(function)
    def call(output: Array, state: Array, *arguments: Any) -> int:
        nonlocal compiled
        if compiled is None and len(output) >= _SMALL:
            compiled = _compile(function)
        if compiled is None or compiled is function:
            # lists are several times faster to read than arrays in plain Python
            plain = [item.tolist() if isinstance(item, np.ndarray) else item for item in arguments]
            return function(output, state, *plain)
        return compiled(output, state, *arguments)

    return call


def _compile(function: Callable[..., int]) -> Callable[..., int]:
    try:
        import numba
    except ImportError:
        return function
    try:
        compiled: Callable[..., int] = numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no folder to keep the compiled code in
        compiled = numba.njit(nogil=True)(function)
    return compiled


@kernel
def rans_decode(output: Array, states: Array, values: Array, table: Array, words: Array, precision: int) -> int:
    """Fill ``output`` with the values of the decoded indices.

    Args:
        output: any dtype [n].
        states: int64[lanes]; index i is in lane i modulo lanes. Left as the states after the last index.
        values: what each index stands for, dtype of ``output`` [K].
        table: int64[2**precision], per slot: frequency << 32 | slot - first slot << 16 | index.
        words: uint16[m].
        precision: bits of a slot.

    Returns:
        Words read, or -1 where there were too few.
    """
    count, lanes, available = len(output), len(states), len(words)
    mask = (1 << precision) - 1
    position = 0
    read = 0
    # all lanes in turn, without a branch, as long as words cannot run out
    while position + lanes <= count and read + lanes <= available:
        for lane in range(lanes):
            state = int(states[lane])
            entry = table[state & mask]
            state = (entry >> 32) * (state >> precision) + ((entry >> 16) & 0xFFFF)
            output[position] = values[entry & 0xFFFF]
            position += 1
            filled = (state << 16) | int(words[read])
            short = state < 65536
            states[lane] = filled if short else state
            read += short
    while position < count:
        state = int(states[position % lanes])
        entry = table[state & mask]
        state = (entry >> 32) * (state >> precision) + ((entry >> 16) & 0xFFFF)
        output[position] = values[entry & 0xFFFF]
        if state < 65536:
            if read == available:
                return -1
            state = (state << 16) | int(words[read])
            read += 1
        states[position % lanes] = state
        position += 1
    return read


@kernel
def rans_encode(words: Array, states: Array, indices: Array, frequencies: Array, starts: Array, precision: int) -> int:
    """Code ``indices`` last to first, filling ``words`` from its end.

    Args:
        words: uint16[n], room for one word an index.
        states: int64[lanes], each LOW; left as the states to begin decoding with.
        indices: any unsigned dtype [n].
        frequencies, starts: int64[K], slots of each index and the first of them.
        precision: the frequencies sum to 2**precision.

    Returns:
        Position of the first word in ``words``.
    """
    lanes = len(states)
    first = len(words)
    for back in range(len(indices)):
        position = len(indices) - 1 - back
        index = indices[position]
        frequency = frequencies[index]
        state = int(states[position % lanes])
        if state >= frequency << (32 - precision):
            first -= 1
            words[first] = state & 0xFFFF
            state >>= 16
        states[position % lanes] = ((state // frequency) << precision) + state % frequency + starts[index]
    return first


@kernel
def huffman_decode(
    output: Array, bits: Array, values: Array, table: Array, words: Array, begins: Array, width: int, chunk: int
) -> int:
    """Fill ``output`` with the values of the decoded indices, four chunks at a time: they do not wait for each other.

    Args:
        output: any dtype [n].
        bits: int64[chunks], filled with the bits read of each; -1 where they began no code.
        values: what each index stands for, dtype of ``output`` [K].
        table: int64[2**width], by the next ``width`` bits: index << 4 | code length, or 0 where no code begins so.
        words: int64[m], all chunks in words of 32 bits, first bit highest, each chunk padded with zeros.
        begins: int64[chunks + 1], the first word of each chunk, and their end.
        width: the longest code, at most 15.
        chunk: indices of each chunk but the last.

    Returns:
        The number of chunks.
    """
    chunks = len(bits)
    mask = (1 << width) - 1
    for first in range(0, chunks, 4):
        lanes = min(4, chunks - first)
        window = np.zeros(4, np.int64)  # its last ``held`` bits are yet to be read
        held = np.zeros(4, np.int64)
        read = np.zeros(4, np.int64)
        lost = np.zeros(4, np.int64)
        for lane in range(lanes):
            read[lane] = begins[first + lane]
        common = len(output) - (chunks - 1) * chunk if first + lanes == chunks else chunk
        for start, end, active in ((0, common, lanes), (common, chunk, lanes - 1)):  # the last chunk may be shorter
            for position in range(start, end):
                for lane in range(active):
                    ready = int(held[lane])
                    ahead = int(window[lane])
                    if ready < 32:
                        word = words[read[lane]] if read[lane] < begins[first + lane + 1] else 0
                        ahead = ((ahead & 0x7FFFFFFF) << 32) | word
                        window[lane] = ahead
                        ready += 32
                        read[lane] += 1
                    entry = table[(ahead >> (ready - width)) & mask]
                    held[lane] = ready - (entry & 15)
                    lost[lane] |= entry == 0
                    output[(first + lane) * chunk + position] = values[entry >> 4]
        for lane in range(lanes):
            used = 32 * (read[lane] - begins[first + lane]) - held[lane]
            bits[first + lane] = -1 if lost[lane] else used
    return chunks
