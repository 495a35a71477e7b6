"""docs/from-tfmot.md: TFMOT's clustering tutorial runs, block by block, and its file is small without gzip."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from compressor import api
from compressor.api import clustering, combine, quantization, sparsity

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "from-tfmot.md").read_text(encoding="utf-8")


def test_the_tutorial_runs_and_the_file_is_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE):
        exec(compile(block, "from-tfmot.md", "exec"), names)
    sizes = names["sizes"]
    assert sizes["clustered, packed"] * 6 < sizes["dense, gzip"], "TFMOT's tutorial: six times, by gzip"
    assert sizes["clustered, packed"] < 0.75 * sizes["clustered and stripped, gzip"]
    assert sizes["pruned, clustered, packed"] * 12 < sizes["dense, gzip"]
    assert names["dense_accuracy"] > 0.95
    assert names["clustered_accuracy"] > names["dense_accuracy"] - 0.02
    assert names["sparse_accuracy"] > names["dense_accuracy"] - 0.04
    out = capsys.readouterr().out
    assert out.startswith("accuracy: dense 9")


def test_the_page_names_every_verb() -> None:
    for module in (api, clustering, combine, sparsity, quantization):
        for name in module.__all__:
            assert re.search(rf"\b{name}\b", PAGE), name
