"""docs/sweeps.md: its commands and their options exist, its file of grids is read, and the rows are as it says."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from compressor.cli.main import cli
from compressor.cli.sweep_options import AXES
from tests.helpers.file_commands import Ran, type_

__all__ = ["type_"]  # the fixture

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "sweeps.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def test_commands_are_parsed() -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(lines) > 5
    for line in lines:
        name, *words = shlex.split(line.partition(" > ")[0])[1:]
        command = cli.commands[name]
        assert command.make_context(name, words)


def test_options_exist() -> None:
    named = set(re.findall(r"--[a-z][a-z0-9-]+", TEXT))
    known = {one for command in cli.commands.values() for parameter in command.params for one in parameter.opts}
    assert len(named) > 20
    assert named <= known


def test_those_that_take_several_values_are_named() -> None:
    (listed,) = re.findall(r"several values, with commas between them:\n(.*?)\. A row", TEXT, re.DOTALL)
    assert set(re.findall(r"`--([a-z-]+)`", listed)) == {name.replace("_", "-") for name in AXES}


def test_the_file_of_grids_is_read(type_: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sweep.toml").write_text(blocks("toml")[0])
    (line,) = [line for block in blocks("sh") for line in block.splitlines() if "sweep.toml" in line]
    code, out, _ = type_(*shlex.split(line)[1:], "--dry-run", "--json")
    assert code == 0
    rows = json.loads(out)["rows"]
    assert len(rows) == 2 * 3 * 2 + 2 * 2
    assert all("--dataset fashion-mnist" in row["command"] and "--epochs 2" in row["command"] for row in rows)


def test_files_of_the_folder_are_those_of_the_code() -> None:
    from compressor.cli import sweep
    from compressor.sweep import ledger

    table = re.findall(r"^\| `([\w./]+)` \|", TEXT, re.MULTILINE)
    folders = {f"{ledger.ROWS}/", f"{sweep.UNTRAINED}/"}
    assert set(table) == {ledger.LINES, ledger.TABLE, sweep.DENSE, sweep.FACTS, *folders}
