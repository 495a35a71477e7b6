"""docs/resuming.md: its Python runs, and so its last assertion holds; its options exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from compressor.cli.main import cli

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "resuming.md").read_text(encoding="utf-8")


def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE):
        exec(compile(block, "resuming.md", "exec"), names)
    assert names["whole"].to_bytes() == names["resumed"].to_bytes()
    assert not (tmp_path / "run.checkpoints").exists()


def test_options_exist() -> None:
    known = {option for parameter in cli.commands["run"].params for option in parameter.opts}
    named = set(re.findall(r"--[a-z-]+", TEXT))
    assert named
    assert named <= known
