"""docs/deploy.md: its Python runs, its own target goes by an entry point, and what it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from compressor.cli.main import cli
from compressor.deployment.registry import REFUSED, TARGETS
from compressor.model_zoo import checkpoint
from tests.test_entry_points import command, installed

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) == 2
    exec(compile(BLOCKS[0], "deploy.md", "exec"), {})
    size = (tmp_path / "packed_reader.py").stat().st_size
    assert capsys.readouterr().out == f"1509152 {checkpoint('test_resnet-tiny').bytes} {size} 0.0\n"


def test_a_package_offers_the_target_of_the_page(tmp_path: Path) -> None:
    path = installed(tmp_path, "npz-export", {}, {}, npz_target=BLOCKS[1])
    entries = path / "npz-export-0.1.dist-info" / "entry_points.txt"
    entries.write_text("[timm_compressor.targets]\nnpz = npz_target\n")
    assert "npz: An .npz file of numpy" in command("targets", path=path, cwd=tmp_path)
    out = command("export", "zoo:test_resnet-tiny", "--to", "npz", path=path, cwd=tmp_path)
    assert out.startswith("test_resnet-tiny.npz  ")
    assert "run and compared: equal bit for bit" in out


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
