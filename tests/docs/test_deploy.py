"""docs/deploy.md: its Python runs, and what it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from compressor.cli.main import cli
from compressor.deployment.registry import REFUSED, TARGETS
from compressor.model_zoo import checkpoint

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
(BLOCK,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCK, "deploy.md", "exec"), {})
    size = (tmp_path / "packed_reader.py").stat().st_size
    assert capsys.readouterr().out == f"1509760 {checkpoint('test_resnet-tiny').bytes} {size} 0.0\n"


def test_every_target_and_refusal_is_described() -> None:
    for name in TARGETS.built_in():
        assert f"\n## `{name}`: " in PAGE
    for name in REFUSED:
        assert f"| {name} |" in PAGE.lower()


def test_options_exist() -> None:
    known = {option for parameter in cli.commands["export"].params for option in parameter.opts}
    lines = re.findall(r"^compress (\w+)(.*)", PAGE, re.MULTILINE)
    assert {name for name, _ in lines} <= cli.commands.keys()
    for name, words in lines:
        assert name != "export" or {word for word in words.split() if word.startswith("-")} <= known
    assert "--dense" in known
