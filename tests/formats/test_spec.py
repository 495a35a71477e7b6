"""SPEC.md's example is what the writer writes, and its limits are the code's."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from compressor.formats.codecs.registry import CODECS
from compressor.formats.content import Content, SharedTensor, Table
from compressor.formats.file import container
from compressor.formats.file.reader import PackedFile
from compressor.formats.file.writer import pack

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


def test_every_codec_is_specified() -> None:
    assert all(f"**`{name}`.**" in SPEC for name in CODECS)


def test_limits_are_those_of_the_code() -> None:
    assert container.MAX_HEADER == 1 << 24
    assert f"at most {container.MAX_DEPTH} levels" in SPEC
