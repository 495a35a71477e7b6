"""The compiled kernels and their plain twins, also on streams no codec would write: one result, no bound crossed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from compressor.formats.codecs import kernels

ITEMS = st.sampled_from([np.uint8, np.uint16, np.uint32])


def both(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> tuple[object, object]:
    """Run once compiled and once in plain Python."""
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_indices_seen", 1 << 40)
        compiled = run()
        patch.setattr(kernels, "compiled_kernel", lambda write, *constants: None)
        return compiled, run()


def guarded(array: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Put an array between bytes that must stay as they are."""
    held = np.full(array.nbytes + 128, 0xA5, np.uint8)
    inner = held[64 : 64 + array.nbytes].view(array.dtype).reshape(array.shape)
    inner[...] = array
    return held, inner


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 200), st.integers(0, 3), st.integers(0, 300), st.integers(0, 16), ITEMS)
def test_rans_decode_of_anything(seed: int, count: int, lanes: int, words: int, precision: int, item: Any) -> None:
    rng = np.random.default_rng(seed)
    slots = 1 << precision
    cuts = np.sort(rng.integers(0, slots, 5))
    frequencies = np.diff(np.concatenate([[0], cuts, [slots]]))
    owner = np.repeat(np.arange(6), frequencies)
    within = np.arange(slots) - (np.cumsum(frequencies) - frequencies)[owner]
    values = rng.integers(0, 256, 6)
    table = (np.minimum(frequencies, 65535)[owner] << 48 | within << 32 | values[owner]).astype(np.uint64)
    states = rng.integers(1 << 16, 1 << 32, 1 << lanes)
    stored = rng.integers(0, 1 << 16, words).astype(np.uint16)

    def run() -> tuple[int, bytes, bytes]:
        held, output = guarded(np.zeros(count, item))
        held_states, left = guarded(states)
        wanted = kernels.rans_decode(output, left, table, stored, precision)
        return wanted, held.tobytes(), held_states.tobytes()

    with pytest.MonkeyPatch.context() as patch:
        compiled, plain = both(patch, run)
    assert compiled == plain


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 200), st.integers(0, 3), st.integers(1, 9), ITEMS)
def test_rans_with_a_table_for_each_index(seed: int, count: int, lanes: int, tables: int, item: Any) -> None:
    """What is encoded is decoded, by both kernels of both kinds."""
    rng = np.random.default_rng(seed)
    frequencies = np.stack([np.bincount(rng.integers(0, 5, 256 - 5), minlength=5) + 1 for _ in range(tables)])
    indices, choices = rng.integers(0, 5, count).astype(item), rng.integers(0, tables, count).astype(np.uint8)
    starts = np.cumsum(frequencies, 1) - frequencies
    slots = np.concatenate([np.repeat(np.arange(5), row) for row in frequencies])
    within = np.concatenate([np.arange(size) for row in frequencies for size in row])
    owned = frequencies[np.repeat(np.arange(tables), 256), slots]
    table = (owned << 48 | within << 32 | slots).astype(np.uint64)

    def run() -> tuple[bytes, bytes, int]:
        held, words = guarded(np.zeros(count, np.uint16))
        states = np.full(1 << lanes, kernels.LOW, np.int64)
        first = kernels.rans_encode(words, states, indices, frequencies, starts, 8, choices)
        assert held[:64].tobytes() + held[-64:].tobytes() == b"\xa5" * 128
        held_output, output = guarded(np.zeros(count, item))
        needed = kernels.rans_decode(output, states, table, words[first:].copy(), 8, choices)
        assert np.array_equal(output, indices)
        assert (states == kernels.LOW).all()
        return words[first:].tobytes(), held_output.tobytes(), needed

    with pytest.MonkeyPatch.context() as patch:
        compiled, plain = both(patch, run)
    assert compiled == plain


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 200), st.integers(0, 3), st.integers(8, 16), ITEMS)
def test_rans_encode(seed: int, count: int, lanes: int, precision: int, item: Any) -> None:
    rng = np.random.default_rng(seed)
    frequencies = np.bincount(rng.integers(0, 7, (1 << precision) - 7), minlength=7) + 1
    indices = rng.integers(0, 7, count).astype(item)

    def run() -> tuple[bytes, bytes]:
        held, words = guarded(np.zeros(count, np.uint16))
        states = np.full(1 << lanes, kernels.LOW, np.int64)
        starts = np.cumsum(frequencies) - frequencies
        first = kernels.rans_encode(words, states, indices, frequencies, starts, precision)
        assert held[:64].tobytes() + held[-64:].tobytes() == b"\xa5" * 128
        return words[first:].tobytes(), states.tobytes()

    with pytest.MonkeyPatch.context() as patch:
        compiled, plain = both(patch, run)
    assert compiled == plain


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 60), st.integers(1, 5), st.integers(0, 90), st.integers(1, 15), ITEMS)
def test_huffman_decode_of_anything(seed: int, count: int, lanes: int, size: int, width: int, item: Any) -> None:
    """Also past the end of the data, and with bits that begin no code."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, width + 1, 1 << width)
    table = np.where(lengths > 0, rng.integers(0, 256, 1 << width) << 8 | lengths, 0).astype(np.uint64)
    data = np.concatenate([rng.integers(0, 256, size), np.zeros(kernels.PADDING)]).astype(np.uint8)
    begins = rng.integers(0, 8 * size + 1, lanes)

    def run() -> tuple[int, bytes, bytes]:
        held, output = guarded(np.zeros((lanes, count), item))
        ends = begins.copy()
        lost = kernels.huffman_decode(output, ends, table, data, width)
        return lost, held.tobytes(), ends.tobytes()

    with pytest.MonkeyPatch.context() as patch:
        compiled, plain = both(patch, run)
    assert compiled == plain


def test_without_llvmlite_plain_python_does_all() -> None:
    """A process that cannot import it writes and reads the same bytes."""
    code = """
import sys, zlib
if sys.argv[1] == "without":
    sys.modules["llvmlite"] = None
import numpy as np
from compressor.formats.codecs.base import Stream
from compressor.formats.codecs.registry import CODECS
indices = (np.arange(100_000) ** 2 % 7).astype(np.uint8)
for name in ("ans", "huffman"):
    data = CODECS[name]().encode(indices, Stream("w", len(indices), 7))
    assert (CODECS[name]().decode(memoryview(data), Stream("w", len(indices), 7)) == indices).all()
    print(zlib.crc32(data))
print("llvmlite.binding" in sys.modules)
"""
    runs = [
        subprocess.run([sys.executable, "-c", code, which], capture_output=True, text=True, check=True).stdout.split()
        for which in ("with", "without")
    ]
    assert runs[0][:2] == runs[1][:2]
    assert [run[2] for run in runs] == ["True", "False"]


def test_few_indices_import_nothing() -> None:
    code = """
import sys
import numpy as np
from compressor.formats.codecs.base import Stream
from compressor.formats.codecs.registry import CODECS
indices = np.zeros(1000, np.uint8)
CODECS["ans"]().encode(indices, Stream("w", 1000, 7))
assert not any(name.startswith("llvmlite") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
