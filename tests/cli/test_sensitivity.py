"""``compress sensitivity``: refusals, table, JSON and CSV."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import timm
from safetensors.torch import save_file

from compressor.cli.main import run
from compressor.lifecycle.sensitivity import Sensitivity

WORDS = ["sensitivity", "test_resnet", "--checkpoint-path", "w.safetensors", "--num-classes", "10", "--in-chans", "1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--price", "5"], "Invalid value for '--price': '5', expected a number above 0 and at most 1"),
        (["--calibration", "none"], "--calibration none: sensitivity is measured on images"),
        (["--calibration-memory", "0"], "--calibration-memory 0: expected at least 1 byte"),
        (["--csv", "nowhere/rows.csv"], "nowhere"),
    ],
)
def test_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sensitivity", "test_resnet", *words]) != 0
    assert message in capsys.readouterr().err


def test_the_memory_of_measurements_is_what_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(timm.create_model("test_resnet", num_classes=10, in_chans=1).state_dict(), "w.safetensors")
    named: list[int] = []

    def measure(*_: Any, memory: int) -> list[Sensitivity]:
        named.append(memory)
        return [Sensitivity("fc.weight", (10, 2), 1e-7, 0.1, 2.0, 0.0, 0.0)]

    monkeypatch.setattr("compressor.lifecycle.sensitivity.sensitivity", measure)
    assert run([*WORDS, "--img-size", "32", "--calibration-memory", "1.5MB"]) == 0
    assert named == [1_500_000]
    assert "fc.weight" in capsys.readouterr().out


@pytest.mark.slow
def test_without_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    save_file(model.state_dict(), "w.safetensors")
    assert run([*WORDS, "--img-size", "32", "--price", "1e-6", "--csv", "rows.csv", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["sensitivity"]
    assert len(rows) == 16
    assert {row["rate"] for row in rows} == {1e-6}
    assert all(row["predicted"] >= 0 for row in rows)
    with Path("rows.csv").open(encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    assert [row["site"] for row in written] == [row["site"] for row in rows]
    assert written[0]["shape"] == "16x1x3x3"
