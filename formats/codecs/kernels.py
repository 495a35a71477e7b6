"""Inner loops of the codecs, each written twice: in the language of ``formats.jit``, and in plain Python.

Plain Python runs where llvmlite is not installed, and until a process has handled so many indices that compilation
pays off; both give the same results, bit for bit. A kernel checks no more than the bounds of its own arrays; its codec
checks what a stream may contain.

The functions whose names begin with ``_write_`` write the machine code of the kernel of the same name; variables and
steps correspond. ``formats.jit.builder`` explains the language.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compressor.formats.jit.cache import compiled_kernel

if TYPE_CHECKING:
    from compressor.formats.jit.builder import Code
    from compressor.formats.jit.values import Value

__all__ = ["LOW", "PADDING", "bit_patterns", "huffman_decode", "rans_decode", "rans_encode"]

Words = NDArray[Any]
"""An array of integers; the docstrings say of which."""

LOW = 1 << 16
"""The smallest state of a rANS lane; states stay in [LOW, LOW << 16)."""

PADDING = 8
"""Bytes that must follow the last byte of a Huffman stream."""

_COMPILE_AFTER = 1 << 16  # indices; to handle these in Python takes as long as to import llvmlite and compile a kernel
_indices_seen = 0


def bit_patterns(values: Words) -> Words:
    """Returns a view of values of 8, 16 or 32 bits as unsigned integers; kernels only copy their bits.

    >>> import numpy as np
    >>> bit_patterns(np.array([1.0], np.float32)).tolist()
    [1065353216]
    """
    return values.view(f"u{values.itemsize}")


def rans_decode(
    output: Words, states: Words, table: Words, words: Words, precision: int, choices: Words | None = None
) -> int:
    """Decodes one chunk of interleaved rANS and fills ``output`` with the values of its indices.

    Index i is decoded with the state x of lane i mod L. The slot t = x mod 2**P belongs to the index of frequency f and
    first slot c with c <= t < c + f, and the state becomes

        x = f * (x >> P) + t - c,  and, where x < LOW,  x = x << 16 | the next word of the chunk.

    Duda, arXiv:1311.2540, 2013; Giesen, arXiv:1402.3392, 2014.

    Args:
        output: uint[n] of 8, 16 or 32 bits, overwritten.
        states: int64[L], L a power of two; overwritten with the states after the last index.
        table: uint64[T * 2**P], T tables; for each slot f << 48 | t - c << 32 | the bits of its index's value.
        words: uint16[m].
        precision: P.
        choices: uint8[n], the table of each index, below T; None where T is 1.

    Returns:
        The number of words needed, which is above m where there were too few; output is then undefined.
    """
    kernel = _compiled(_write_rans_decode, len(output), output.itemsize, choices is not None)
    if kernel:
        chosen = () if choices is None else (choices,)
        return kernel(output, len(output), states, len(states), table, words, len(words), precision, *chosen)
    entries, lane_states, word_list, needed = table.tolist(), states.tolist(), words.tolist(), 0
    first_slots = [0] * len(output) if choices is None else (choices.astype(np.int64) << precision).tolist()
    for position in range(len(output)):
        lane = position % len(lane_states)
        entry = entries[first_slots[position] + (lane_states[lane] & (1 << precision) - 1)]
        output[position] = entry & 0xFFFFFFFF
        state = (entry >> 48) * (lane_states[lane] >> precision) + (entry >> 32 & 0xFFFF)
        if state < LOW:
            if needed < len(word_list):
                state = state << 16 | word_list[needed]
            needed += 1
        lane_states[lane] = state
    states[:] = lane_states
    return needed


def _write_rans_decode(code: Code, item_bytes: int, several_tables: int) -> None:
    output, count = code.array(0, 8 * item_bytes), code.number(1)
    states, lanes = code.array(2, 64), code.number(3)
    table, words, available, precision = code.array(4, 64), code.array(5, 16), code.number(6), code.number(7)
    choices = code.array(8, 8) if several_tables else None
    position, lane, needed = code.variable(0), code.variable(0), code.variable(0)
    mask = (code.constant(1) << precision) - 1

    def decode(output_position: Value, state: Value) -> tuple[Value, Value]:
        """Writes the value of one index; returns its lane's new state, and 1 where this lacks a word."""
        slot = state & mask
        entry = table[slot if choices is None else (choices[output_position] << precision) + slot]
        output[output_position] = entry
        new_state = (entry >> 48) * (state >> precision) + (entry >> 32 & 0xFFFF)
        return new_state, new_state < LOW

    # As long as words cannot run out, all lanes in turn without a branch: the next word is loaded in any case.
    with code.loop(lambda: (position.get() + lanes < count + 1) & (needed.get() + lanes < available + 1)):
        lane.set(0)
        with code.loop(lambda: lane.get() < lanes):
            number, next_word = lane.get(), needed.get()
            state, lacks_word = decode(position.get() + number, states[number])
            states[number] = lacks_word.choose(state << 16 | words[next_word], state)
            needed.set(next_word + lacks_word)
            lane.set(number + 1)
        position.set(position.get() + lanes)
    # The last indices, each with a check that there is a word.
    with code.loop(lambda: position.get() < count):
        number, next_word = position.get() & (lanes - 1), needed.get()
        state, lacks_word = decode(position.get(), states[number])
        states[number] = state
        with code.when(lacks_word & (next_word < available)):
            states[number] = state << 16 | words[next_word]
        needed.set(next_word + lacks_word)
        position.set(position.get() + 1)
    code.give(needed.get())


def rans_encode(
    words: Words,
    states: Words,
    indices: Words,
    frequencies: Words,
    starts: Words,
    precision: int,
    choices: Words | None = None,
) -> int:
    """Encodes one chunk by interleaved rANS, the inverse of ``rans_decode``: from the last index to the first.

    With x the state of the index's lane, f its frequency and c its first slot,

        where x >= f << 32 - P,  the word x mod 2**16 is written before the last one, and x = x >> 16;
        then  x = (x div f << P) + x mod f + c.

    Args:
        words: uint16[n], room for one word an index, which is filled from its end.
        states: int64[L], L a power of two, all LOW; overwritten with the states that decoding begins with.
        indices: uint[n] of 8, 16 or 32 bits.
        frequencies: int64[T, K], each row sums to 2**P; those of the indices are above 0. int64[K] where T is 1.
        starts: the first slot of each index, as ``frequencies``.
        precision: P.
        choices: uint8[n], the row of each index, below T; None where T is 1.

    Returns:
        The position of the first word written to ``words``.
    """
    codewords = frequencies.shape[-1]
    kernel = _compiled(_write_rans_encode, len(indices), indices.itemsize, choices is not None)
    if kernel:
        chosen = () if choices is None else (choices, codewords)
        return kernel(words, states, len(states), indices, len(indices), frequencies, starts, precision, *chosen)
    index_frequencies, first_slots = frequencies.reshape(-1).tolist(), starts.reshape(-1).tolist()
    lane_states, first = states.tolist(), len(words)
    for position in range(len(indices) - 1, -1, -1):
        index, lane = int(indices[position]), position % len(lane_states)
        index += 0 if choices is None else int(choices[position]) * codewords
        state, frequency = lane_states[lane], index_frequencies[index]
        if state >= frequency << 32 - precision:
            first -= 1
            words[first] = state & 0xFFFF
            state >>= 16
        quotient, remainder = divmod(state, frequency)
        lane_states[lane] = (quotient << precision) + remainder + first_slots[index]
    states[:] = lane_states
    return first


def _write_rans_encode(code: Code, item_bytes: int, several_tables: int) -> None:
    words, states, lanes = code.array(0, 16), code.array(1, 64), code.number(2)
    indices, count = code.array(3, 8 * item_bytes), code.number(4)
    frequencies, starts, precision = code.array(5, 64), code.array(6, 64), code.number(7)
    remaining, first = code.variable(count), code.variable(count)
    with code.loop(lambda: code.constant(0) < remaining.get()):
        position = remaining.get() - 1
        remaining.set(position)
        index, lane = indices[position], position & (lanes - 1)
        if several_tables:
            index = code.array(8, 8)[position] * code.number(9) + index
        frequency, state = frequencies[index], states[lane]
        fits = state < frequency << (code.constant(32) - precision)
        # Without a branch: a word is written in any case and overwritten by the next one where the state fits. There is
        # room for it, since no more words than indices have been written.
        next_first = first.get() - 1
        words[next_first] = state
        first.set(fits.choose(first.get(), next_first))
        state = fits.choose(state, state >> 16)
        quotient = state // frequency
        states[lane] = (quotient << precision) + (state - quotient * frequency) + starts[index]
    code.give(first.get())


def huffman_decode(output: Words, positions: Words, table: Words, data: Words, width: int) -> int:
    """Decodes several chunks of prefix codes side by side and fills ``output`` with the values of their indices.

    The next ``width`` bits of a chunk, whatever follows its next code, select the table entry of that code. The chunks
    are decoded in turn, so that the processor overlaps the steps of one with those of the others.

    Args:
        output: uint[L, n] of 8, 16 or 32 bits, a row for each chunk; overwritten.
        positions: int64[L], the bit of ``data`` where each chunk begins; overwritten with the bit after its last code.
        table: uint64[2**width], the bits of the index's value << 8 | the length of its code; 0 for bits that begin no
            code.
        data: uint8[m], first bit highest, the last PADDING of them 0.
        width: the length of the longest code, from 1 to 15.

    Returns:
        1 where bits occurred that begin no code, else 0.
    """
    kernel = _compiled(_write_huffman_decode, output.size, output.itemsize)
    if kernel:
        return kernel(output, output.shape[1], positions, len(positions), table, data, len(data) - PADDING, width)
    entries, stored, invalid = table.tolist(), data.tobytes(), False
    for row, start in enumerate(positions.tolist()):
        bit = start
        for column in range(output.shape[1]):
            byte = min(bit >> 3, len(stored) - PADDING)
            following = int.from_bytes(stored[byte : byte + 4], "big") << (bit & 7) & 0xFFFFFFFF
            entry = entries[following >> 32 - width]
            output[row, column] = entry >> 8
            bit += entry & 255
            invalid |= not entry
        positions[row] = bit
    return int(invalid)


_LOADED_BITS = 57  # bits that a load of eight bytes gives at least, from any bit of its first byte on


def _write_huffman_decode(code: Code, item_bytes: int) -> None:
    output, count = code.array(0, 8 * item_bytes), code.number(1)
    positions, lanes = code.array(2, 64), code.number(3)
    table, data, size, width = code.array(4, 64), code.array(5, 8), code.number(6), code.number(7)
    column, lane, step, invalid = code.variable(0), code.variable(0), code.variable(0), code.variable(0)
    bit, following = code.variable(0), code.variable(0)
    shift, codes_per_load = code.constant(64) - width, code.constant(_LOADED_BITS) // width
    # All lanes in turn, each as many codes as one load is sure to hold. The same loop handles the last codes, since a
    # second one takes longer to compile than it saves.
    with code.loop(lambda: column.get() < count):
        remaining = count - column.get()
        codes = (codes_per_load < remaining).choose(codes_per_load, remaining)
        lane.set(0)
        with code.loop(lambda: lane.get() < lanes):
            number = lane.get()
            first = number * count + column.get()
            bit.set(positions[number])
            byte = bit.get() >> 3
            following.set(data.word_at((byte < size).choose(byte, size)).swap_bytes() << (bit.get() & 7))
            step.set(0)
            with code.loop(lambda: step.get() < codes):
                entry = table[following.get() >> shift]
                length = entry & 255
                output[first + step.get()] = entry >> 8
                invalid.set(invalid.get() | (length < 1))
                following.set(following.get() << length)
                bit.set(bit.get() + length)
                step.set(step.get() + 1)
            positions[number] = bit.get()
            lane.set(number + 1)
        column.set(column.get() + codes)
    code.give(invalid.get())


def _compiled(write: Callable[..., Any], count: int, *constants: int) -> Callable[..., int] | None:
    """Returns the kernel compiled for these constants and ``count`` more indices; None where plain Python is used."""
    global _indices_seen
    _indices_seen += count
    return compiled_kernel(write, *constants) if _indices_seen > _COMPILE_AFTER else None
