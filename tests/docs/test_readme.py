"""README: its Python runs, its recipe reads, and every option and command it names exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import pytest

from compressor import Recipe
from compressor.cli.main import cli

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_python_runs_from_first_block_to_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    out = capsys.readouterr().out
    assert out.startswith("model     test_resnet(")
    assert "whole file" in out


def test_python_of_the_schemes_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("python", (ROOT / "docs" / "schemes.md").read_text(encoding="utf-8"))
    exec(compile(block, "schemes.md", "exec"), {})
    assert (tmp_path / "hashed.safetensors").stat().st_size < 4 * (1024 * 1024 + 10 * 1024) / 50


def test_recipe_reads() -> None:
    (text,) = blocks("toml")
    assert len(Recipe.from_toml(text, "README").stages[0].policy.rules) == 3


def test_first_screen_has_exactly_the_two_commands() -> None:
    first, second, *_ = blocks("sh")
    assert first == "python -m pip install . && compress resnet34 --scheme learnt --bits 4\n"
    assert second == "python -m pip install '.[test]' && python -m pytest\n"
    assert README.index(second) < README.index("\n## ")


def test_options_and_commands_exist() -> None:
    commands = [line for block in blocks("sh")[2:] for line in block.splitlines() if line]
    assert commands
    for line in commands:
        words = line.partition("#")[0].split()
        assert words[0] == "compress"
        command: click.Command = cli.commands.get(words[1], cli.commands["run"])
        assert not isinstance(command, click.Group) or words[2] in command.commands
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known
