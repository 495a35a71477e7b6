"""docs/post-training.md: its Python runs and keeps what the page says; its options exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from compressor.cli.main import cli

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "post-training.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "post-training.md", "exec"), names)
    assert (tmp_path / "now.safetensors").stat().st_size <= 50_000
    assert 58_800 <= names["size"] <= 60_000
    assert names["size"] == (tmp_path / "digits.safetensors").stat().st_size
    assert names["dense"] > 0.9
    assert names["packed"] > names["dense"] - 0.05
    weights = sum(site.tensor.numel() for site in names["job"].sites)
    assert 1.47 <= 8 * len(names["without_data"].to_bytes()) / weights <= 1.5
    assert len(names["smallest"].to_bytes()) < names["size"] * 2


def test_options_exist() -> None:
    commands = cli.commands["run"], cli.commands["sensitivity"]
    parameters = [parameter for command in commands for parameter in command.params]
    known = {option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)}
    named = set(re.findall(r"--[a-z][a-z0-9-]+", TEXT))
    assert {"--target-size", "--target-bits", "--max-drop", "--rate", "--calibration"} <= named <= known
