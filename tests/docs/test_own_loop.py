"""docs/own-loop.md runs, block by block, and its networks are as good as it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import compressor

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "own-loop.md").read_text(encoding="utf-8")


def test_the_loops_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "own-loop.md", "exec"), names)
    assert names["dense"] > 0.9
    assert names["plain"] > names["dense"] - 0.03
    assert names["accelerated"] > names["dense"] - 0.03
    assert names["explained"](names["loaded"]) > names["explained"](names["regression"]) - 0.03 > 0.3
    for name in ("plain.safetensors", "accelerated.safetensors"):
        state = compressor.load_state_dict(tmp_path / name)
        assert [len(state[site].unique()) for site in ("0.weight", "4.weight")] == [4, 4]
    out = capsys.readouterr().out
    assert "at 2 bits" in out
