"""A run that can be watched: how far sharing has come, the bar and the lines, the summary, TensorBoard's scalars."""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from compressor.cli.main import run
from compressor.cli.show import Step
from compressor.training.loop import Epoch
from compressor.training.metrics import SharingMetrics
from tests.helpers.runs import OUT, GoneError, Runs, _here, die, killed, runs, weights

__all__ = ["_here", "runs", "weights"]  # the fixtures

SUMMARY = Path("out.summary.csv")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("compressor.cli.show.time.monotonic", clock)
    return clock


class Loss:
    """Counts how often it is read: on a GPU that is dear."""

    reads = 0

    def __float__(self) -> float:
        self.reads += 1
        return 0.5


EPOCH = Epoch(1, 2, 0.25, 0.1, SharingMetrics(3.414, 1.0, 0.0212))


def test_without_a_terminal_a_line_every_ten_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    step, loss = Step("3/4", "fine-tuning"), Loss()
    for done in range(1, 31):
        clock.now += 0.5
        step.on_step(done, 60, loss)
    step.on_epoch(EPOCH, 0.972)
    clock.now += 9
    step.on_step(31, 60, loss)
    step.done("2 epochs")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "3/4 fine-tuning    step 21 of 60  loss 0.500  0:10, 0:20 left",
        "3/4 fine-tuning    epoch 1 of 2  loss 0.250  validation 97.2 %  3.41 bits/weight  2.1 % of indices changed  "
        "0:15",
        "3/4 fine-tuning    2 epochs  0:24",
    ]
    assert loss.reads == 1


def test_on_a_terminal_a_bar(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks for the loss once a second; the line of an epoch stands above it."""
    terminal, loss = Terminal(), Loss()
    monkeypatch.setattr(sys, "stderr", terminal)
    step = Step("3/4", "fine-tuning")
    for done in range(5, 31):  # resumed after 4
        clock.now += 0.25
        step.on_step(done, 60, loss)
    step.on_epoch(EPOCH, 0.972)
    step.bar.mininterval = 0
    step.on_step(31, 60, loss)
    step.bar.refresh()
    shown = terminal.getvalue().split("\r")[-1]
    assert "31/60" in shown
    assert " left, loss 0.500" in shown
    line = "epoch 1 of 2  loss 0.250  validation 97.2 %  3.41 bits/weight  2.1 % of indices changed"
    assert " ".join(line.split()) in " ".join(terminal.getvalue().split())
    assert loss.reads <= 26 / 4 + 2
    step.on_step(12, 60, loss)  # a training that went back
    assert step.bar.n == 12
    step.done("2 epochs")
    assert click.unstyle(terminal.getvalue()).endswith("3/4 fine-tuning    2 epochs  0:06\n")


def rows() -> list[dict[str, str]]:
    with SUMMARY.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_summary_has_timms_columns(runs: Runs) -> None:
    SUMMARY.write_text("an older run's\n7,8\n")
    said = runs(0)
    found = rows()
    sharing = ["train_bits_per_weight", "train_changed", "train_price", "train_size", "train_target_size"]
    assert list(found[0]) == ["epoch", "train_loss", *sharing, "eval_top1", "lr"]
    assert {row["train_price"] for row in found} == {""}, "no size is held"
    assert [row["epoch"] for row in found] == ["0", "1", "2", "3"]
    shown = [line for line in said.splitlines() if " epoch " in line]
    for row, line in zip(found, shown, strict=True):
        assert f"loss {float(row['train_loss']):.3f}" in line
        assert f"validation {float(row['eval_top1']):.1f} %" in line
        assert f"{float(row['train_bits_per_weight']):.2f} bits/weight" in line
    assert float(found[0]["lr"]) > float(found[3]["lr"]) >= 0


def test_a_resumed_run_repeats_no_row(runs: Runs) -> None:
    runs(0, "--summary", "a.csv")
    whole = Path("a.csv").read_text().splitlines()
    OUT.unlink()
    killed(runs, 13)
    with SUMMARY.open("a") as file:  # as if it had been killed after the row, and before the checkpoint
        file.write("2,9,9,9,9,9\n")
    runs(0, "--resume")
    resumed = SUMMARY.read_text().splitlines()
    assert [row.split(",")[:2] for row in resumed] == [row.split(",")[:2] for row in whole]


def test_a_summary_that_cannot_be_written(runs: Runs, caplog: pytest.LogCaptureFixture) -> None:
    """Before the long work; where it is lost on the way, the training goes on."""
    Path("folder").mkdir()
    assert "folder" in runs.refused(6, "--summary", "folder")
    assert "nowhere" in runs.refused(6, "--summary", "nowhere/a.csv")
    runs(0, at=3, act=lambda: SUMMARY.mkdir())
    assert caplog.messages[0].startswith("epoch 1 is not noted (")
    assert caplog.messages[0].endswith("; the training goes on")
    assert OUT.exists()


def test_epochs_count_through_all_stages(runs: Runs) -> None:
    stage = '[[stage]]\nepochs = 2\nbatch_size = 16\nrule = [{ match = "*", scheme = "kmeans", bits = 2 }]\n'
    Path("two.toml").write_text(2 * stage)
    at = runs.words.index("--epochs")
    runs.words = (runs.words[0], *runs.words[at + 8 :], "--recipe", "two.toml")
    runs(0)
    assert [row["epoch"] for row in rows()] == ["0", "1", "2", "3"]


def test_tensorboard(runs: Runs) -> None:
    pytest.importorskip("tensorboard")
    read: Any = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    runs(0, "--log", "tensorboard")
    events = read.EventAccumulator("out.tensorboard").Reload()
    for name, column in (("loss", "train_loss"), ("top1", "eval_top1"), ("bits_per_weight", "train_bits_per_weight")):
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        noted = [(int(row["epoch"]), float(row[column])) for row in rows()]
        assert shown == [(epoch, pytest.approx(value, rel=1e-6)) for epoch, value in noted]


def test_tensorboard_is_not_installed(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch.utils.tensorboard", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    said = runs.refused(4, "--log", "tensorboard")
    assert said.startswith("--log tensorboard: ")
    assert said.endswith("; pip install 'timm-compressor[tensorboard]'")
    assert not OUT.exists()


def test_what_is_noted_needs_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tiny", "--checkpoint-path", "x", "--summary", "a.csv"]) == 2
    assert "no data to train on for --summary: name --dataset or --data-dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "teacher", "summary"),
    [((), "dense", "out.summary.csv"), (("--distill", "0"), None, "out.summary.csv"), (("--epochs", "0"), None, None)],
)
def test_json_says_how_it_was_trained(
    runs: Runs, more: tuple[str, ...], teacher: str | None, summary: str | None
) -> None:
    assert run([*runs.words, "--json", *more]) == 0
    document = json.loads(runs.capsys.readouterr().out)
    assert (document["teacher"], document["summary"], document["seed"]) == (teacher, summary, 0)
    assert document["recipe"]["stage"][0]["batch_size"] == 16
    assert SUMMARY.exists() == (summary is not None)


def test_a_run_that_is_killed_keeps_its_rows(runs: Runs) -> None:
    with pytest.raises(GoneError):
        runs(0, at=13, act=die)
    assert [row["epoch"] for row in rows()] == ["0", "1"]
    assert all(math.isfinite(float(row["train_loss"])) for row in rows())
