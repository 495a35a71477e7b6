"""rANS: near the entropy, exact at its ends, and safe with tables that lie."""

from __future__ import annotations

import hashlib
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from compressor.formats.codecs import kernels
from compressor.formats.codecs.ans import Ans
from compressor.formats.codecs.base import Stream
from compressor.formats.codecs.chunks import CHUNK
from compressor.formats.codecs.frequencies import (
    FRACTION,
    choose_frequencies,
    code_lengths,
    quantise_histogram,
    read_frequencies,
    write_frequencies,
)
from compressor.formats.content import index_dtype
from compressor.formats.errors import FormatError


def stream(count: int, codewords: int) -> Stream:
    return Stream("fc.weight", count, codewords)


def drawn(count: int, weights: NDArray[np.float64]) -> NDArray[Any]:
    chance = np.random.default_rng(0).choice(len(weights), count, p=weights / weights.sum())
    return chance.astype(index_dtype(len(weights)))


def forged(table: bytes, states: list[int], words: list[int], precision: int = 8) -> memoryview:
    """Make a one-chunk stream of anything."""
    lanes = (len(states).bit_length() - 1) << 5
    body = struct.pack(f"<I{len(states)}I{len(words)}H", len(words), *states, *words)
    return memoryview(bytes([precision | lanes]) + table + body)


HALVES = write_frequencies(np.array([128, 128]))


@pytest.mark.parametrize("count", [10_000, 36_864, 300_000, 2_359_296])
@pytest.mark.parametrize(
    ("codewords", "spread"), [(2, 0.2), (3, 0.15), (5, 0.2), (16, 0.3), (16, 3.0), (16, 100.0), (32, 0.4), (256, 30.0)]
)
def test_size_is_the_entropy(count: int, codewords: int, spread: float) -> None:
    """Within 0.1 % and 64 bytes and the table of frequencies."""
    weights = np.exp(-np.abs(np.arange(codewords) - codewords // 2) / spread)
    indices = drawn(count, weights)
    shares = np.bincount(indices, minlength=codewords) / count
    entropy = -float((shares[shares > 0] * np.log2(shares[shares > 0])).sum()) * count / 8
    data = Ans().encode(indices, stream(count, codewords))
    table = read_frequencies(memoryview(data)[1:], codewords, data[0] & 31, "test")[1]
    assert len(data) - table <= entropy * 1.001 + 64
    np.testing.assert_array_equal(Ans().decode(memoryview(data), stream(count, codewords)), indices)


@pytest.mark.parametrize(("count", "size"), [(1, 10), (1_048_575, 10), (1_048_576, 10), (1_048_577, 18)])
def test_a_chunk_has_up_to_two_to_the_twenty_indices(count: int, size: int) -> None:
    """A byte, a byte of frequencies, and four of size and four of state for each chunk: no index needs a bit."""
    assert len(Ans().encode(np.zeros(count, np.uint8), stream(count, 2))) == size


def test_the_index_after_the_first_chunk() -> None:
    indices = (np.arange(1_048_577) % 3 == 0).astype(np.uint8)
    data = Ans().encode(indices, stream(1_048_577, 2))
    assert np.array_equal(Ans().decode(memoryview(data), stream(1_048_577, 2)), indices)


def test_below_a_hundredth_of_a_bit() -> None:
    indices = drawn(1_500_000, np.array([1.0, 2000.0, 1.0]))
    data = Ans().encode(indices, stream(len(indices), 3))
    assert len(data) * 8 / len(indices) < 0.014
    np.testing.assert_array_equal(Ans().decode(memoryview(data), stream(len(indices), 3)), indices)


def test_constant_indices_cost_a_few_bytes_whatever_their_number() -> None:
    assert len(Ans().encode(np.full(CHUNK, 3, np.uint8), stream(CHUNK, 16))) == 1 + 8 + 4 + 4


def test_chunks_meet_without_seams() -> None:
    indices = drawn(CHUNK + 5, np.array([3.0, 1.0, 1.0]))
    data = Ans().encode(indices, stream(len(indices), 3))
    np.testing.assert_array_equal(Ans().decode(memoryview(data), stream(len(indices), 3)), indices)


def test_a_known_stream() -> None:
    """Worked by hand: precision 8, frequencies 128 and 128, one lane; 16 indices 0 shift the state by 16 bits."""
    state, indices = 1 << 16, [1, 0, 0, 1]
    for index in reversed(indices):
        state = (state // 128 << 8) + state % 128 + 128 * index
    decoded = Ans().decode(forged(HALVES, [state], []), stream(4, 2))
    assert decoded.tolist() == indices


def test_rare_codewords_in_many_indices() -> None:
    """The sizes at growing precision have a dip and rise before they fall: all must be tried."""
    weights = np.exp(-np.abs(np.arange(3) - 1) / 0.17)
    indices = drawn(4_000_000, weights)
    shares = np.bincount(indices, minlength=3) / len(indices)
    entropy = -float((shares * np.log2(shares)).sum()) * len(indices) / 8
    assert len(Ans().encode(indices, stream(len(indices), 3))) <= entropy * 1.001 + 64


@pytest.mark.parametrize("precision", range(17))
def test_frequencies_are_stored_exactly(precision: int) -> None:
    rng = np.random.default_rng(precision)
    for codewords in (1, 2, 3, 16, 255, 300):
        used = rng.integers(1, min(codewords, 1 << precision) + 1)
        histogram = np.zeros(codewords, np.int64)
        histogram[rng.choice(codewords, used, replace=False)] = rng.integers(1, 10_000, used)
        frequencies = quantise_histogram(histogram, precision)
        assert frequencies.sum() == 1 << precision
        assert ((frequencies > 0) == (histogram > 0)).all()
        if frequencies.max() >> 15 == 0:
            data = write_frequencies(frequencies)
            read, size = read_frequencies(memoryview(data + b"rest"), codewords, precision, "test")
            assert size == len(data)
            np.testing.assert_array_equal(read, frequencies)


def test_quantised_frequencies_are_nearly_the_best() -> None:
    """Against all frequencies that sum to 16, for three codewords."""
    for histogram in np.random.default_rng(0).integers(1, 100, (50, 3)):
        costs = [
            float(-(histogram * np.log2(np.array([a, b, 16 - a - b]) / 16)).sum())
            for a in range(1, 15) for b in range(1, 16 - a)
        ]  # fmt: skip
        chosen = float(-(histogram * np.log2(quantise_histogram(histogram, 4) / 16)).sum())
        assert chosen <= min(costs) * 1.01


def test_logarithms_are_the_same_everywhere() -> None:
    """Their sum is fixed, since another table would change the bytes that are written."""
    frequencies = np.arange(1, 1 << 15)
    lengths = code_lengths(frequencies, 15)
    exact = (15 - np.log2(frequencies)) * (1 << FRACTION)
    assert np.abs(lengths - exact).max() < 2
    assert hashlib.sha256(lengths.astype("<i8").tobytes()).hexdigest() == (
        "776dd819905d2511e67b8b2daf0b698bbeb00d96ab943aca6ff89ca547a38e5d"
    )


def test_the_platforms_logarithm_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    indices = drawn(10_000, np.array([9.0, 3.0, 1.0, 0.2]))
    before = Ans().encode(indices, stream(len(indices), 4))

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("differs between machines")

    for name in ("log", "log2", "log10", "log1p", "exp", "exp2"):
        monkeypatch.setattr(np, name, forbidden)
    assert Ans().encode(indices, stream(len(indices), 4)) == before


def test_a_lower_precision_is_taken_unless_a_higher_one_pays() -> None:
    """Halves need no precision at all; shares no low precision has are worth a larger table in many indices."""
    assert choose_frequencies(np.array([1 << 30, 1 << 30]))[0] == 8
    shares = np.array([5_000_000, 3_000_001, 1_234_567, 17])
    assert choose_frequencies(shares // 1_000)[0] < choose_frequencies(shares)[0]
    for histogram in np.random.default_rng(0).integers(1, 1_000_000, (20, 9)):
        size = choose_frequencies(histogram)[2]
        for other in range(8, 17):
            tried = quantise_histogram(histogram, other)
            if not tried.max() >> 15:
                bytes_of = int((histogram * code_lengths(tried, other)).sum()) / (8 << FRACTION)
                assert size <= (bytes_of + len(write_frequencies(tried)) + 1) * 1.00006


# -- bytes that lie


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "no bytes for 4 indices"),
        (bytes([17]) + HALVES, "precision 17"),
        (bytes([31]) + HALVES, "precision 31"),
        (bytes([8]), "cut"),
        (bytes([8]) + HALVES[:1], "cut"),
        (bytes([8]) + HALVES, "sizes of 1 chunks"),
        (forged(write_frequencies(np.array([128, 127])), [1 << 16], []), "sum to 255, expected 256"),
        (forged(write_frequencies(np.array([128, 129])), [1 << 16], []), "sum to 257, expected 256"),
        (forged(write_frequencies(np.array([0, 0])), [1 << 16], []), "sum to 0"),
        (forged(HALVES, [(1 << 16) - 1], []), "state below"),
        (forged(HALVES, [0, 1 << 16], []), "state below"),
        (forged(HALVES, [1 << 16], []), "chunk 0"),
        (forged(HALVES, [(1 << 32) - 1], []), "chunk 0"),
        (forged(HALVES, [1 << 20], [0, 0]), "chunk 0"),
        (bytes(forged(HALVES, [1 << 20], [])) + b"\0", "after the frequencies"),
    ],
)
def test_lies(data: Any, fault: str) -> None:
    with pytest.raises(FormatError, match=fault):
        Ans().decode(memoryview(data), stream(4, 2))


def test_padding_of_the_frequencies_must_be_zero() -> None:
    data = bytearray(Ans().encode(np.array([0, 0, 1, 2, 0], np.uint8), stream(5, 3)))
    assert data[2] >> 4 == 0
    data[2] |= 0x10
    with pytest.raises(FormatError, match="more than 3"):
        Ans().decode(memoryview(data), stream(5, 3))


def test_giant_sizes_of_chunks_are_refused_before_they_are_read() -> None:
    data = bytes([8]) + HALVES + b"\xff\xff\xff\xff" + bytes(4)
    with pytest.raises(FormatError, match="expected 8589934598"):
        Ans().decode(memoryview(data), stream(4, 2))


def test_no_bytes_decode_to_nothing_but_an_error() -> None:
    """Coders below one bit an index may take any count from zero bytes: not here."""
    tracemalloc.start()
    with pytest.raises(FormatError, match="no bytes for 1000000 indices"):
        Ans().decode(memoryview(b""), stream(1_000_000, 16))
    assert tracemalloc.get_traced_memory()[1] < 1 << 16
    tracemalloc.stop()


# -- compiled and plain


@pytest.mark.parametrize("codec", ["ans", "huffman", "classes"])
@pytest.mark.parametrize("lookup", [False, True])
def test_plain_python_agrees_with_machine_code(monkeypatch: pytest.MonkeyPatch, codec: str, lookup: bool) -> None:
    from compressor.formats.codecs.registry import CODECS

    indices = drawn(300_000, np.array([30.0, 1.0, 5.0, 0.1, 9.0]))  # four whole Huffman chunks and a rest
    values = np.array([0.5, 1.0, 1.5, 2.0, 2.5], np.float32)

    def run() -> tuple[bytes, NDArray[Any]]:
        data = CODECS[codec]().encode(indices, stream(len(indices), 5))
        if lookup:
            return data, CODECS[codec]().lookup(memoryview(data), stream(len(indices), 5), values)
        return data, CODECS[codec]().decode(memoryview(data), stream(len(indices), 5))

    monkeypatch.setattr(kernels, "_indices_seen", 1 << 40)
    compiled = run()
    monkeypatch.setattr(kernels, "compiled_kernel", lambda write, *constants: None)
    slow = run()
    assert slow[0] == compiled[0]
    assert slow[1].dtype == compiled[1].dtype
    np.testing.assert_array_equal(slow[1], compiled[1])


def test_set_padding_after_the_frequencies_is_refused() -> None:
    """Lengths 7 and 8, which leave 6 + 7 bits below the highest: three bits of the second byte are padding."""
    table = write_frequencies(np.array([100, 156]))
    assert len(table) == 3
    assert read_frequencies(memoryview(table), 2, 8, "test")[0].tolist() == [100, 156]
    damaged = table[:2] + bytes([table[2] | 0x80])
    with pytest.raises(FormatError, match="its padding is not zero"):
        read_frequencies(memoryview(damaged), 2, 8, "test")


@pytest.mark.parametrize(("count", "lanes"), [(3_000, 1), (5_000, 2), (9_000, 4), (17_000, 8), (60_000, 8)])
def test_about_four_thousand_bytes_justify_a_lane(count: int, lanes: int) -> None:
    """All bytes alike take a byte each; twice as many lanes from 4,096, 8,192 and 16,384 bytes on, up to 8."""
    indices = np.random.default_rng(0).permutation(np.arange(count) % 256).astype(np.uint8)
    data = Ans().encode(indices, stream(count, 256))
    assert 1 << (data[0] >> 5) == lanes
    assert np.array_equal(Ans().decode(memoryview(data), stream(count, 256)), indices)
