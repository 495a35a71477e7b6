"""Packages older than this one was made for are named at the start, not met far away."""

from __future__ import annotations

import pytest

from compressor.cli import main, requirements
from compressor.formats.errors import MissingError


def test_the_installed_packages_are_in_range() -> None:
    requirements.check_requirements()


def test_old_and_absent_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["torch>=99", "numpy>=1", "no-such-package>=2", "pytest>=99; extra == 'test'"]
    monkeypatch.setattr(requirements, "requires", lambda name: needed)
    with pytest.raises(MissingError) as caught:
        requirements.check_requirements()
    said = str(caught.value)
    assert said.startswith("torch>=99 is needed, 2.")
    assert "no-such-package>=2 is not installed" in said
    assert "numpy" not in said
    assert "pytest" not in said


def test_the_command_names_old_packages_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(requirements, "requires", lambda name: ["timm>=99"])
    assert main.run(["test_resnet"]) == 4
    said = capsys.readouterr().err
    assert "timm>=99 is needed" in said
    assert len(said.strip().splitlines()) == 1


def test_a_source_tree_that_was_never_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    requirements.check_requirements("no-such-distribution")
