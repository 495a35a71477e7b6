"""rANS with classes: near the entropy given the tables, nothing for what is certain, and safe with streams that lie."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from compressor.formats.codecs.ans import Ans
from compressor.formats.codecs.base import Stream
from compressor.formats.codecs.bit_text import to_bytes
from compressor.formats.codecs.chunks import CHUNK
from compressor.formats.codecs.classes import PlacedAns, StreamReader
from compressor.formats.codecs.cost_tables import CostTables, Curve, write_tables
from compressor.formats.errors import FormatError
from tests.formats.codecs.test_site_classes import ONE, TWO, drawn
from tests.helpers import slow_ans

STREAM = Stream("fc.weight", 64 * 48 * 9, 31, (64, 48, 3, 3))
CODEC = PlacedAns()


def entropy(counts: NDArray[np.int64]) -> float:
    """Bytes of symbols that occur so often, each row coded for itself."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return -float((counts * np.log2(np.where(shares > 0, shares, 1))).sum()) / 8


@pytest.mark.parametrize("factors", [(TWO,), (ONE, TWO), (ONE, ONE, TWO), (TWO, TWO, TWO), (np.array([0.02, 0.3]),)])
def test_size_is_the_entropy_given_the_tables(factors: tuple[Any, ...]) -> None:
    """Within 0.5 % and 32 bytes, and the tables and classes, of which it says what they take."""
    indices = drawn(*factors)
    data = CODEC.encode(indices, STREAM)
    reader = StreamReader(memoryview(data), STREAM)
    classes = reader.classes()
    counts = np.zeros((reader.tables, 31), np.int64)
    np.add.at(counts, (classes.choices(0, STREAM.count), indices), 1)
    given_tables = entropy(counts)
    of_classes = sum(entropy(np.bincount(axis)[None]) for axis in classes.axes)
    assert reader.tables > 1
    assert len(data) <= 1.005 * given_tables + of_classes + reader.head_size + 32
    assert len(data) < 0.97 * len(Ans().encode(indices, STREAM))


def test_without_classes_it_takes_no_more_than_ans() -> None:
    for seed in range(3):
        indices = drawn(ONE, seed=seed)
        assert len(CODEC.encode(indices, STREAM)) <= len(Ans().encode(indices, STREAM))


def test_rows_of_one_codeword_cost_next_to_nothing() -> None:
    """Twice the rows, of zeros, take the entropy of their classes and a few bytes."""
    indices = drawn(ONE, sizes=(32, 48, 9))
    wider = np.full((64, 48 * 9), 15, np.uint8)
    wider[::2] = indices.reshape(32, -1)
    half = len(CODEC.encode(indices, Stream("w", indices.size, 31, (32, 48, 9))))
    assert len(CODEC.encode(wider.reshape(-1), Stream("w", wider.size, 31, (64, 48, 9)))) <= half + 64 / 8 + 12


def test_chunks_meet_in_the_middle_of_a_row() -> None:
    sizes = 3, 700, 700
    indices = drawn(np.array([0.2, 2.0, 0.2]), np.array([1.0, 0.3]), sizes=sizes)
    stream = Stream("w", indices.size, 31, sizes)
    assert CHUNK < stream.count < 2 * CHUNK
    data = CODEC.encode(indices, stream)
    assert StreamReader(memoryview(data), stream).tables > 1
    np.testing.assert_array_equal(CODEC.decode(memoryview(data), stream), indices)


def test_the_platforms_logarithm_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    indices = drawn(TWO, TWO)
    before = CODEC.encode(indices, STREAM)

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("differs between machines")

    for name in ("log", "log2", "log10", "log1p", "exp", "exp2", "power"):
        monkeypatch.setattr(np, name, forbidden)
    assert CODEC.encode(indices, STREAM) == before


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from([(5, 6), (8, 3, 3, 3), (20, 1, 5), (2, 30, 2)]), st.integers(2, 40), st.integers(0, 2**32 - 1))
def test_the_slow_reader_reads_what_is_written(shape: tuple[int, ...], codewords: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.normal(size=shape[0])).reshape(-1, *[1] * (len(shape) - 1)) * codewords / 10
    indices = np.clip(np.rint(rng.normal(size=shape) * spread + codewords // 3), 0, codewords - 1).astype(np.uint8)
    stream = Stream("fc.weight", indices.size, codewords, shape)
    data = CODEC.encode(indices.reshape(-1), stream)
    assert slow_ans.classes(data, list(shape), codewords) == indices.reshape(-1).tolist()


# -- bytes that lie


def forged(head: str, tables: list[tuple[CostTables, int]], body: bytes = b"") -> memoryview:
    return memoryview(to_bytes(head + "".join(write_tables(*table) for table in tables)) + body)


FLAT = CostTables(0, 0, 0, (Curve((0,)),))  # both of two codewords alike
LOW = (1 << 16).to_bytes(4, "little")
SMALL = Stream("fc.weight", 4, 2, (2, 2))


def head(precision: int, lanes: int = 0, tables: int = 1) -> str:
    return f"{precision:04b}{lanes:03b}{tables - 1:05b}"


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (memoryview(b""), "is cut"),
        (forged(head(15), [(FLAT, 2)], LOW), "precision 15, expected at most 14"),
        (forged(head(8), []), "is cut"),
        (forged(head(0), [(FLAT, 2)], LOW), "more codewords than its 1 slots"),
        (forged(head(8), [(FLAT, 2)]), "0 bytes after the frequencies, expected 4"),
        (forged(head(8), [(FLAT, 2)], LOW + b"\0"), "5 bytes after the frequencies, expected 4"),
        (forged(head(8), [(FLAT, 2)], b"\xff\xff\0\0"), "a state below 65536"),
        (forged(head(8), [(FLAT, 2)], LOW), "chunk 0: its 0 words"),
        (forged(head(8), [(FLAT, 2)], (1 << 21).to_bytes(4, "little")), "chunk 0: its 0 words"),
        (forged(head(8), [(FLAT, 2)], LOW + b"\0\0\0\0"), "chunk 0: its 2 words"),
        (forged(head(8, tables=2), [(FLAT, 2)]), "is cut"),
        (forged(head(1, tables=2), [(FLAT, 2), (FLAT, 2), (CostTables(0, 0, 0, (Curve(()),) * 2), 2)], LOW), "chunk 0"),
    ],
)
def test_lies(data: memoryview, fault: str) -> None:
    with pytest.raises(FormatError, match=rf"indices of 'fc\.weight': .*{fault}"):
        CODEC.decode(data, SMALL)


def test_a_known_stream() -> None:
    """Worked by hand: 128 slots of 256 each; four indices 0 halve the state four times."""
    data = forged(head(8), [(FLAT, 2)], (1 << 20).to_bytes(4, "little"))
    assert bytes(data[:-4]).hex() == "80000c"  # P = 8, L = 1, T = 1; centre 0, q = 0, g = 0, a curve of one number, 0
    assert CODEC.decode(data, SMALL).tolist() == [0, 0, 0, 0]


def test_padding_after_the_tables_must_be_zero() -> None:
    data = bytearray(CODEC.encode(np.array([0, 1, 1, 0], np.uint8), SMALL))
    size = StreamReader(memoryview(data), SMALL).head_size
    assert not data[size - 1] & 1
    data[size - 1] |= 1
    with pytest.raises(FormatError, match="padding"):
        CODEC.decode(memoryview(data), SMALL)


@pytest.mark.parametrize("bit", range(0, 8 * 60, 3))
def test_every_flipped_bit_decodes_or_is_refused(bit: int) -> None:
    indices = drawn(TWO, sizes=(24, 12, 3))
    stream = Stream("fc.weight", indices.size, 31, (24, 12, 3))
    data = bytearray(CODEC.encode(indices, stream))
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    try:
        decoded = CODEC.decode(memoryview(data), stream)
    except FormatError:
        return
    assert decoded.shape == (stream.count,)
    assert decoded.max() < 31


def test_every_prefix_is_refused() -> None:
    indices = drawn(TWO, sizes=(24, 12, 3))
    stream = Stream("fc.weight", indices.size, 31, (24, 12, 3))
    data = CODEC.encode(indices, stream)
    assert StreamReader(memoryview(data), stream).tables > 1
    for size in range(len(data)):
        with pytest.raises(FormatError, match=r"fc\.weight"):
            CODEC.decode(memoryview(data[:size]), stream)


def test_no_memory_is_taken_before_tables_and_sizes_are_read() -> None:
    stream = Stream("fc.weight", 1 << 40, 4, (1 << 20, 1 << 20))
    tracemalloc.start()
    for data in (b"", b"\x80\x10", bytes(40)):
        with pytest.raises(FormatError, match=r"fc\.weight"):
            CODEC.decode(memoryview(data), stream)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
