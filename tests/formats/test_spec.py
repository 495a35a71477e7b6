"""SPEC.md's example is what the writer writes, and its limits are the code's."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from compressor.formats.codecs.base import Stream
from compressor.formats.codecs.registry import CODECS
from compressor.formats.content import Content, SharedTensor, Table
from compressor.formats.dtypes import ITEM_SIZES
from compressor.formats.file import container, opening
from compressor.formats.file.deflate import DICTIONARY
from compressor.formats.file.reader import PackedFile
from compressor.formats.file.writer import pack
from tests.helpers import slow_ans, slow_reader

SPEC = (Path(__file__).resolve().parents[2] / "formats" / "SPEC.md").read_text(encoding="utf-8")


def example() -> bytes:
    """Read the hex dump: offset, bytes in groups, text."""
    block = SPEC.split("```")[1]
    return bytes.fromhex("".join(row[5:59] for row in block.split("\n")[1:-1]))


def test_example_is_what_the_writer_writes() -> None:
    site = SharedTensor((2, 3), 0, np.array([0, 1, 2, 2, 1, 0], np.uint8))
    assert pack(Content({"fc.weight": site}, (Table.of([-1.0, 0.0, 2.0]),)), "bits") == example()


def test_example_reads_as_it_says() -> None:
    with PackedFile.from_bytes(example()) as file:
        assert file.tensor("fc.weight").tolist() == [[-1, 0, 2], [2, 0, -1]]


def vectors() -> list[tuple[str, int, tuple[int, ...], list[int], bytes]]:
    """Codec, number of codewords, shape, indices and stream of each row of the tables."""
    number = r"(\d[\d ]*)"
    rows = re.findall(rf"^\| `(\w+)` \| (\d+) \| (?:{number} \| )?{number} \| `([0-9a-f]+)` \|$", SPEC, re.MULTILINE)
    return [
        (codec, int(k), tuple(map(int, shape.split())), list(map(int, text.split())), bytes.fromhex(data))
        for codec, k, shape, text, data in rows
    ]


def test_every_codec_has_a_vector() -> None:
    assert [codec for codec, *_ in vectors()] == ["bits", "huffman", "ans", "hashed", "classes"]


@pytest.mark.parametrize(("codec", "codewords", "shape", "indices", "data"), vectors(), ids=lambda of: str(of)[:8])
def test_vectors_are_what_is_written_and_read(
    codec: str, codewords: int, shape: tuple[int, ...], indices: list[int], data: bytes
) -> None:
    stream = Stream("fc.weight", len(indices), codewords, shape)
    assert CODECS[codec]().decode(memoryview(data), stream).tolist() == indices
    settings = {"seed": 7} if codec == "hashed" else {}
    assert CODECS[codec](**settings).encode(np.array(indices, np.uint8), stream) == data
    if CODECS[codec].places:
        assert slow_ans.classes(data, list(shape), codewords) == indices
    else:
        assert getattr(slow_reader, codec)(data, len(indices), codewords, "fc.weight") == indices


def test_absent_scale_and_offset_are_skipped() -> None:
    """-0.0 + 0.0 would be 0.0, and -0.0 * 1.0 is -0.0."""
    book, indices = (Table(np.array([-0.0, 1.0], np.float32).reshape(1, 2, 1)),), np.array([0, 1], np.uint8)
    plain, offset = SharedTensor((2,), 0, indices), SharedTensor((2,), 0, indices, offset=np.zeros(1, np.float32))
    with PackedFile.from_bytes(pack(Content({"a": plain, "b": offset}, book))) as file:
        assert np.signbit(file.tensor("a")).tolist() == [True, False]
        assert np.signbit(file.tensor("b")).tolist() == [False, False]


def test_equal_codewords_may_follow_each_other_and_overflow_is_infinite() -> None:
    book = (Table(np.array([2, 2, 3e38], np.float32).reshape(1, 3, 1)),)
    site = SharedTensor((3,), 0, np.array([0, 1, 2], np.uint8), scale=np.array([10], np.float32))
    half = SharedTensor((3,), 0, np.array([0, 1, 2], np.uint8), dtype="F16")
    with PackedFile.from_bytes(pack(Content({"a": site, "b": half}, book))) as file:
        assert file.tensor("a").tolist() == [20, 20, float("inf")]
        assert file.tensor("b").tolist() == [2, 2, float("inf")]


def test_dtypes_are_those_of_the_code() -> None:
    sentence = SPEC.split("Dtypes of untouched tensors, with bytes: ")[1].split(". Of books")[0]
    sizes = {}
    for names, size in re.findall(r"((?:`\w+`\s+)+)(\d)", sentence):
        sizes.update(dict.fromkeys(re.findall(r"\w+", names), int(size)))
    assert sizes == ITEM_SIZES


def test_every_codec_is_specified() -> None:
    assert all(f"**`{name}`.**" in SPEC for name in CODECS)


def test_limits_are_those_of_the_code() -> None:
    assert container.MAX_HEADER == 1 << 24
    assert f"at most {container.MAX_DEPTH} levels" in SPEC
    assert f"without its line ends: {len(DICTIONARY):,} bytes" in SPEC
    assert (opening._MAX_METADATA, opening._ALWAYS_ALLOWED, opening._MAX_RATIO) == (1 << 24, 1 << 18, 32)
    assert "`m` ≤ 2^24 and `m` ≤ 2^18 + 32·`c`" in SPEC
