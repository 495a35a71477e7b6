"""``compress init``: it writes a recipe that ``compress MODEL`` runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.file_commands import Ran, type_

__all__ = ["type_"]  # the fixture


@pytest.fixture(autouse=True)
def _here(own_folder: Path) -> None:
    pass


def test_the_recipe_is_one_that_runs(type_: Callable[..., Ran]) -> None:
    code, out, err = type_("init", "test_resnet")
    assert (code, err) == (0, [])
    assert out == "test_resnet.toml  run it with: compress test_resnet --recipe test_resnet.toml\n"
    code, out, _ = type_("test_resnet", "--recipe", "test_resnet.toml", "--dry-run")
    assert code == 0
    assert "ignored by rule 1 (conv1.0)" in out


def test_the_command_is_one_that_a_shell_reads(type_: Callable[..., Ran]) -> None:
    _, out, _ = type_("init", "test_resnet", "-o", "my own.toml")
    assert out == "my own.toml  run it with: compress test_resnet --recipe 'my own.toml'\n"


def test_a_file_is_replaced_by_force_alone(type_: Callable[..., Ran]) -> None:
    path = Path("own.toml")
    path.write_text("mine")
    code, _, (line,) = type_("init", "test_resnet", "-o", "own.toml")
    assert (code, line) == (2, "error: own.toml exists: give another name, or --force to replace it")
    assert path.read_text() == "mine"
    assert type_("init", "test_resnet", "-o", "own.toml", "--force")[0] == 0
    assert path.read_text().startswith("# test_resnet: ")


def test_a_misspelt_model_is_refused(type_: Callable[..., Ran]) -> None:
    code, _, (line,) = type_("init", "test_resnt")
    assert code == 4
    assert "Did you mean 'test_resnet'?" in line
    assert not Path("test_resnt.toml").exists()
