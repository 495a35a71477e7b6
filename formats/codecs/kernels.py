"""Inner loops of the codecs, each twice: as machine code, and as the same steps in plain Python.

Plain Python is what runs where llvmlite is missing, and until a process has met so many indices that compiling pays;
both give the same results, bit for bit. Nothing here checks more than its own bounds: what a stream may hold is
checked by its codec.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from compressor.formats.jit.cache import compiled_kernel

if TYPE_CHECKING:
    from compressor.formats.jit.builder import Code
    from compressor.formats.jit.values import Value

__all__ = ["LOW", "PADDING", "bit_patterns", "huffman_decode", "rans_decode", "rans_encode"]

Words = NDArray[Any]

LOW = 1 << 16
"""Smallest state of a rANS lane; states stay in [LOW, LOW << 16)."""

PADDING = 8
"""Bytes that must follow the last one of a Huffman stream."""

_ENOUGH = 1 << 16  # so many indices in plain Python take as long as to import llvmlite and compile a kernel
_met = 0


def bit_patterns(values: Words) -> Words:
    """View values of 8 to 32 bits as unsigned integers: to the kernels they are only bits.

    >>> import numpy as np
    >>> bit_patterns(np.array([1.0], np.float32)).tolist()
    [1065353216]
    """
    return values.view(f"u{values.itemsize}")


def rans_decode(output: Words, states: Words, table: Words, words: Words, precision: int) -> int:
    """Fill ``output`` with what the decoded indices stand for.

    Args:
        output: unsigned, 8 to 32 bits [n].
        states: int64[lanes], lanes a power of two; index i is in lane i modulo lanes. Left as after the last index.
        table: uint64[2**precision], per slot: frequency << 48 | slot - first slot << 32 | what its index stands for.
        words: uint16[m].
        precision: bits of a slot.

    Returns:
        Words wanted; more than m where there were too few.
    """
    native = _native(_write_rans_decode, output.itemsize, len(output))
    if native:
        return native(output, len(output), states, len(states), table, words, len(words), precision)
    entries, held, stored, wanted = table.tolist(), states.tolist(), words.tolist(), 0
    for position in range(len(output)):
        lane = position % len(held)
        entry = entries[held[lane] & (1 << precision) - 1]
        output[position] = entry & 0xFFFFFFFF
        held[lane] = (entry >> 48) * (held[lane] >> precision) + (entry >> 32 & 0xFFFF)
        if held[lane] < LOW:
            if wanted < len(stored):
                held[lane] = held[lane] << 16 | stored[wanted]
            wanted += 1
    states[:] = held
    return wanted


def _write_rans_decode(code: Code, item: int) -> None:
    output, count = code.array(0, item), code.number(1)
    states, lanes = code.array(2, 64), code.number(3)
    table, words, available, precision = code.array(4, 64), code.array(5, 16), code.number(6), code.number(7)
    position, lane, wanted = code.variable(0), code.variable(0), code.variable(0)
    mask = (code.constant(1) << precision) - 1

    def decode(at: Value, state: Value) -> tuple[Value, Value]:
        entry = table[state & mask]
        output[at] = entry
        left = (entry >> 48) * (state >> precision) + (entry >> 32 & 0xFFFF)
        return left, left < LOW

    # all lanes in turn, without a branch, as long as words cannot run out
    with code.loop(lambda: (position.get() + lanes < count + 1) & (wanted.get() + lanes < available + 1)):
        lane.set(0)
        with code.loop(lambda: lane.get() < lanes):
            number, next_word = lane.get(), wanted.get()
            state, short = decode(position.get() + number, states[number])
            states[number] = short.choose(state << 16 | words[next_word], state)
            wanted.set(next_word + short)
            lane.set(number + 1)
        position.set(position.get() + lanes)
    with code.loop(lambda: position.get() < count):
        number, next_word = position.get() & (lanes - 1), wanted.get()
        state, short = decode(position.get(), states[number])
        states[number] = state
        with code.when(short & (next_word < available)):
            states[number] = state << 16 | words[next_word]
        wanted.set(next_word + short)
        position.set(position.get() + 1)
    code.give(wanted.get())


def rans_encode(words: Words, states: Words, indices: Words, frequencies: Words, starts: Words, precision: int) -> int:
    """Code ``indices`` last to first, filling ``words`` from its end.

    Args:
        words: uint16[n], room for one word an index.
        states: int64[lanes], lanes a power of two, each LOW; left as the states to begin decoding with.
        indices: unsigned, 8 to 32 bits [n].
        frequencies, starts: int64[K], slots of each index and the first of them.
        precision: the frequencies sum to 2**precision.

    Returns:
        Position of the first word in ``words``.
    """
    native = _native(_write_rans_encode, indices.itemsize, len(indices))
    if native:
        return native(words, states, len(states), indices, len(indices), frequencies, starts, precision)
    slots, begins, held, first = frequencies.tolist(), starts.tolist(), states.tolist(), len(words)
    for position in range(len(indices) - 1, -1, -1):
        index, lane = int(indices[position]), position % len(held)
        if held[lane] >= slots[index] << 32 - precision:
            first -= 1
            words[first] = held[lane] & 0xFFFF
            held[lane] >>= 16
        quotient, rest = divmod(held[lane], slots[index])
        held[lane] = (quotient << precision) + rest + begins[index]
    states[:] = held
    return first


def _write_rans_encode(code: Code, item: int) -> None:
    words, states, lanes = code.array(0, 16), code.array(1, 64), code.number(2)
    indices, count = code.array(3, item), code.number(4)
    frequencies, starts, precision = code.array(5, 64), code.array(6, 64), code.number(7)
    left, first = code.variable(count), code.variable(count)
    with code.loop(lambda: code.constant(0) < left.get()):
        position = left.get() - 1
        left.set(position)
        index, lane = indices[position], position & (lanes - 1)
        frequency, state = frequencies[index], states[lane]
        fits = state < frequency << (code.constant(32) - precision)
        place = first.get() - 1
        words[place] = state  # overwritten by the next where this one fits; there is room: place >= position
        first.set(fits.choose(first.get(), place))
        state = fits.choose(state, state >> 16)
        quotient = state // frequency
        states[lane] = (quotient << precision) + (state - quotient * frequency) + starts[index]
    code.give(first.get())


def huffman_decode(output: Words, ends: Words, table: Words, data: Words, width: int) -> int:
    """Fill ``output`` with what the decoded indices stand for, several chunks in turn: they do not wait for each other.

    Args:
        output: unsigned, 8 to 32 bits [lanes, n], a row for each chunk.
        ends: int64[lanes], the bit where each chunk begins; left as the bit after its last index.
        table: uint64[2**width], by the next ``width`` bits: what the index stands for << 8 | length of its code; or 0
            where no code begins so.
        data: uint8[m], first bit highest, the last PADDING of them 0.
        width: the longest code, at most 15.

    Returns:
        1 where bits were met that begin no code, else 0.
    """
    native = _native(_write_huffman_decode, output.itemsize, output.size)
    if native:
        return native(output, output.shape[1], ends, len(ends), table, data, len(data) - PADDING, width)
    entries, stored, lost = table.tolist(), data.tobytes(), False
    for row, begin in enumerate(ends.tolist()):
        at = begin
        for position in range(output.shape[1]):
            byte = min(at >> 3, len(stored) - PADDING)
            ahead = int.from_bytes(stored[byte : byte + 4], "big") << (at & 7) & 0xFFFFFFFF
            entry = entries[ahead >> 32 - width]
            output[row, position] = entry >> 8
            at += entry & 255
            lost |= not entry
        ends[row] = at
    return int(lost)


_AHEAD = 57  # bits that a word has at least after those before the next code


def _write_huffman_decode(code: Code, item: int) -> None:
    output, count = code.array(0, item), code.number(1)
    ends, lanes = code.array(2, 64), code.number(3)
    table, data, size, width = code.array(4, 64), code.array(5, 8), code.number(6), code.number(7)
    position, lane, step, lost = code.variable(0), code.variable(0), code.variable(0), code.variable(0)
    at, ahead = code.variable(0), code.variable(0)
    shift, most = code.constant(64) - width, code.constant(_AHEAD) // width
    # all lanes in turn, each as many codes as a word is sure to hold; one loop for the last ones too: less to compile
    with code.loop(lambda: position.get() < count):
        left = count - position.get()
        codes = (most < left).choose(most, left)
        lane.set(0)
        with code.loop(lambda: lane.get() < lanes):
            number = lane.get()
            first = number * count + position.get()
            at.set(ends[number])
            byte = at.get() >> 3
            ahead.set(data.word_at((byte < size).choose(byte, size)).swap_bytes() << (at.get() & 7))
            step.set(0)
            with code.loop(lambda: step.get() < codes):
                entry = table[ahead.get() >> shift]
                length = entry & 255
                output[first + step.get()] = entry >> 8
                lost.set(lost.get() | (length < 1))
                ahead.set(ahead.get() << length)
                at.set(at.get() + length)
                step.set(step.get() + 1)
            ends[number] = at.get()
            lane.set(number + 1)
        position.set(position.get() + codes)
    code.give(lost.get())


def _native(write: Callable[..., Any], item_bytes: int, count: int) -> Callable[..., int] | None:
    """Give the compiled kernel, or None while, or where, plain Python does."""
    global _met
    _met += count
    return compiled_kernel(write, 8 * item_bytes) if _met > _ENOUGH else None
