"""The reader's own comparison sees every tensor that is not as ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor.deployment.packed_model import PackedModel
from compressor.deployment.registry import TARGETS, make_target
from compressor.formats.file.reader import PackedFile
from compressor.formats.file.writer import write
from tests.helpers.file_commands import small

CHANGES = {
    "a sign": ("weights * spread(scale", "-weights * spread(scale"),
    "a dtype": ("values.astype(KINDS[kind])", "values"),
    "a tensor more": ("return {**tensors, **{alias", 'return {"more": 0, **tensors, **{alias'),
    "no aliases": ('meta.get("aliases", {}).items()}}', "[]}}"),
}


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Returns a file of three dtypes with a tied tensor."""
    write(tmp_path / "small.safetensors", small())
    return tmp_path / "small.safetensors"


def test_every_dtype_is_equal(packed: Path, tmp_path: Path) -> None:
    target = make_target("reader", {})
    with PackedFile.open(packed) as file:
        model = PackedModel(file, packed)
        (tmp_path / "reader.py").write_bytes(target.build(model)[".py"])
        assert target.difference({".py": tmp_path / "reader.py"}, model) == 0


@pytest.mark.parametrize("change", CHANGES)
def test_a_reader_that_reads_otherwise_is_seen(change: str, packed: Path, tmp_path: Path) -> None:
    target, (old, new) = TARGETS["reader"](), CHANGES[change]
    with PackedFile.open(packed) as file:
        model = PackedModel(file, packed)
        text = target.build(model)[".py"].decode()
        assert text.count(old) == 1
        (tmp_path / "reader.py").write_text(text.replace(old, new), encoding="utf-8")
        assert target.difference({".py": tmp_path / "reader.py"}, model) == float("inf")
