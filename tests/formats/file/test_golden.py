"""Golden files are read for ever, by both readers alike, and today's writer still writes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from compressor.formats.content import Content, RawTensor, SharedTensor, Table
from compressor.formats.file.opening import VERSION
from compressor.formats.file.reader import PackedFile
from compressor.formats.file.writer import pack
from tests.formats.file.test_packed_file import random_content
from tests.golden import write
from tests.helpers import slow_ans, slow_reader

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
FILES = sorted(GOLDEN.glob("v*/*.safetensors"))


def tensors(file: PackedFile) -> slow_reader.Tensors:
    """Returns what the slow reader gives."""
    read: slow_reader.Tensors = {}
    for name, (holder, _) in file.slices.items():
        if holder in file.sites:
            weights = file.tensor(name)
            read[name] = (file.sites[holder].dtype, weights.shape, weights.tobytes())
    for name in file.raw_names:
        raw = file.raw(name)
        read[name] = (raw.dtype, raw.shape, raw.data)
    return {**read, **{alias: read[name] for alias, name in file.aliases.items()}}


def test_every_golden_file_is_there() -> None:
    for folder in GOLDEN.glob("v*"):
        names = {path.name for path in folder.glob("*.safetensors")}
        assert names == set(json.loads((folder / "tensors.json").read_text()))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_golden_file_decodes_to_its_hash_with_both_readers(path: Path) -> None:
    data = path.read_bytes()
    assert write.digest(data) == json.loads((path.parent / "tensors.json").read_text())[path.name]
    with PackedFile.open(path) as file:
        assert file.check() == []
        assert tensors(file) == slow_reader.read(data)


@pytest.mark.parametrize("name", sorted(write.golden()))
def test_the_writer_still_writes_the_same_bytes(name: str) -> None:
    """Where a better encoder changes this, say so in the changelog and add files; never rewrite those there are."""
    assert write.golden()[name] == (GOLDEN / f"v{VERSION}" / name).read_bytes()


@pytest.mark.parametrize("seed", range(30))
def test_readers_agree_on_random_content(seed: int) -> None:
    data = pack(random_content(seed), ["auto", "ans", "bits", "huffman", "classes"][seed % 5])
    with PackedFile.from_bytes(data) as file:
        assert tensors(file) == slow_reader.read(data)


@pytest.mark.parametrize(
    "site",
    [
        SharedTensor((0,), 0, np.zeros(0, np.uint8)),
        SharedTensor((0, 3), 0, np.zeros(0, np.uint8), "F16", block=2),
        SharedTensor((3, 0, 2), 0, np.zeros(0, np.uint8), "BF16", axis=0, scale=np.ones(3, np.float32)),
    ],
    ids=lambda site: "x".join(map(str, site.shape)),
)
def test_readers_agree_on_an_axis_of_size_zero(site: SharedTensor) -> None:
    data = pack(Content({"empty": site}, (Table.of([-1.0, 1.0]),), {"full": RawTensor("U8", (2,), b"ab")}))
    expected = {"empty": (site.dtype, site.shape, b""), "full": ("U8", (2,), b"ab")}
    with PackedFile.from_bytes(data) as file:
        assert tensors(file) == expected
    assert slow_reader.read(data) == expected


def test_slow_reader_is_short_and_shares_nothing() -> None:
    for module in (slow_reader, slow_ans):
        text = Path(str(module.__file__)).read_text(encoding="utf-8")
        assert len(text.splitlines()) < 250
        assert "import compressor" not in text
        assert "from compressor" not in text
