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
    """Run ``function`` compiled. Its first argument is the output array, the others arrays to read, and numbers."""
    compiled: Callable[..., int] | None = None

    @functools.wraps(function)
    def call(output: Array, *arguments: Any) -> int:
        nonlocal compiled
        if compiled is None and len(output) >= _SMALL:
            compiled = _compile(function)
        if compiled is None or compiled is function:
            # lists are several times faster than arrays in plain Python; states are written, so they stay an array
            plain = [item.tolist() if isinstance(item, np.ndarray) and item.size > 64 else item for item in arguments]
            return function(output, *plain)
        return compiled(output, *arguments)

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
def rans_decode(output: Array, values: Array, table: Array, words: Array, states: Array, precision: int) -> int:
    """Fill ``output`` with the values of the decoded indices.

    Args:
        output: any dtype [n].
        values: what each index stands for, dtype of ``output`` [K].
        table: int64[2**precision], per slot: frequency << 32 | slot - first slot << 16 | index.
        words: int64 or uint16 [m].
        states: int64[lanes]; index i is in lane i modulo lanes. Left as the states after the last index.
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
def rans_encode(words: Array, indices: Array, frequencies: Array, starts: Array, states: Array, precision: int) -> int:
    """Code ``indices`` last to first, filling ``words`` from its end.

    Args:
        words: uint16[n], room for one word an index.
        indices: any unsigned dtype [n].
        frequencies, starts: int64[K], slots of each index and the first of them.
        states: int64[lanes], each LOW; left as the states to begin decoding with.
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
def huffman_decode(output: Array, values: Array, table: Array, data: Array, width: int) -> int:
    """Fill ``output`` with the values of the decoded indices.

    Args:
        output: any dtype [n].
        values: what each index stands for, dtype of ``output`` [K].
        table: int64[2**width], by the next ``width`` bits: index << 4 | code length, or 0 where no code begins so.
        data: uint8[m].
        width: the longest code, at most 15.

    Returns:
        Bits read, or -1 where there were too few or a code was none.
    """
    size = len(data)
    read = 0
    window = 0  # the last ``held`` bits of it are yet to be read
    held = 0
    for position in range(len(output)):
        if held < width:
            while held <= 40 and read < size:
                window = ((window << 8) | int(data[read])) & 0xFFFFFFFFFFFF
                held += 8
                read += 1
        ahead = window >> (held - width) if held >= width else window << (width - held)
        entry = table[ahead & ((1 << width) - 1)]
        length = entry & 15
        held -= length
        if held < 0 or length == 0:
            return -1
        output[position] = values[entry >> 4]
    return 8 * read - held
