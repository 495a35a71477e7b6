"""Runs that train towards a target: the size is held, and the best file so far is there whatever ends the run."""

from __future__ import annotations

import csv
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import compressor
from compressor.cli.so_far import NAME, BestSoFar
from compressor.formats.errors import ResourceError
from compressor.formats.file.reader import PackedFile
from compressor.lifecycle.packed import Packed
from compressor.training.evaluation import evaluate
from tests.helpers.runs import FOLDER, OUT, Runs, _here, kept, killed, tell, weights
from tests.helpers.tiny import few_digits

__all__ = ["_here", "weights"]  # the fixtures

BEST = FOLDER / NAME
TARGET = 2_000


@pytest.fixture
def runs(weights: Path, capsys: pytest.CaptureFixture[str]) -> Runs:
    return Runs(weights, capsys).without_bits("--target-size", "2KB")


def top1_of(path: Path) -> float:
    return evaluate(compressor.load(path), few_digits().eval_loader(256, "validation")).top1


@pytest.mark.parametrize("more", [(), ("--model-ema-decay", "0.9", "--mixup", "0.2"), ("--scheme", "learnt")])
def test_the_file_keeps_to_the_target_and_the_summary_has_price_and_size(
    runs: Runs, more: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    said = runs(0, *more)
    assert 0.97 * TARGET <= OUT.stat().st_size <= TARGET
    assert not FOLDER.exists()
    assert not [message for message in caplog.messages if "more than the" in message]
    before, *epochs = [line for line in said.splitlines() if "fine-tuning" in line and "validation" in line]
    assert "before it: validation" in before
    assert all("bytes at a price of" in line for line in epochs[:4])
    with Path("out.summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    assert all(float(row["train_price"]) > 0 for row in rows)
    assert all(0.9 * TARGET < int(row["train_size"]) < 1.2 * TARGET for row in rows)


@pytest.mark.parametrize("before", [0.0, 0.99])
def test_where_training_gains_nothing_the_file_before_it_is_named(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, before: float
) -> None:
    monkeypatch.setattr("compressor.cli.so_far.evaluate", lambda *_: SimpleNamespace(top1=before))
    lines = runs(0, "--epochs", "1").splitlines()
    said = "training has gained nothing: before it validation 99.0 %, in the file that --epochs 0 writes"
    assert (said in lines) == (before > 0.5)


def test_without_epochs_nothing_is_trained_and_nothing_kept(runs: Runs) -> None:
    said = runs(0, "--epochs", "0")
    assert "fine-tuning" not in said
    assert OUT.stat().st_size <= TARGET
    assert not FOLDER.exists()


@pytest.mark.parametrize("step", [1, 9])
def test_a_run_that_is_stopped_leaves_its_best_file(runs: Runs, step: int) -> None:
    said = runs(7, at=step, act=tell(signal.SIGINT)).splitlines()
    (line,) = (line for line in said if line.startswith("the best file so far: "))
    size, top1 = BEST.stat().st_size, top1_of(BEST)
    assert line == f"the best file so far: {BEST}  {size:,} bytes, validation {100 * top1:.1f} %"
    assert size <= TARGET
    with PackedFile.open(BEST) as file:
        assert file.provenance["validation"] == top1


def test_a_run_that_is_killed_leaves_it_too_and_ends_as_an_uninterrupted_one(runs: Runs) -> None:
    whole = runs.whole()
    killed(runs, 2)
    assert BEST.stat().st_size <= TARGET
    runs(0, "--force")
    assert OUT.read_bytes() == whole
    OUT.unlink()
    killed(runs, 20, "--checkpoint-steps", "7")
    assert NAME in kept()
    runs(0, "--resume")
    assert OUT.read_bytes() == whole
    assert not FOLDER.exists()


def test_keeping_it_changes_nothing_of_the_training(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = runs.whole()
    monkeypatch.setattr(BestSoFar, "offer", lambda *_: None)
    runs(0)
    assert OUT.read_bytes() == whole


@pytest.mark.parametrize(("measured", "best"), [((0.5, 0.4, 0.3), 0.5), ((0.1, 0.4, 0.3), 0.4), ((0.1, 0.2, 0.3), 0.3)])
def test_of_all_epochs_the_best_is_kept(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, measured: tuple[float, ...], best: float
) -> None:
    values = iter(measured)
    monkeypatch.setattr("compressor.cli.so_far.evaluate", lambda *_: SimpleNamespace(top1=next(values)))
    said = runs(7, at=13, act=tell(signal.SIGINT))
    assert f"bytes, validation {100 * best:.1f} %" in said
    with PackedFile.open(BEST) as file:
        assert file.provenance["validation"] == best


def test_a_damaged_best_file_is_replaced(runs: Runs) -> None:
    runs(7, at=9, act=tell(signal.SIGINT))
    BEST.write_bytes(BEST.read_bytes()[:100])
    runs(7, "--resume", at=15, act=tell(signal.SIGINT))
    assert top1_of(BEST) > 0


@pytest.mark.parametrize("epochs", [5, 12])
def test_a_run_that_ended_goes_on_with_more_epochs(runs: Runs, epochs: int) -> None:
    """The price that post-training has found is part of the run, so the number of epochs must not change it."""
    runs(0, "--keep-checkpoints")
    said = runs(0, "--resume", "--epochs", f"{epochs}", "--force")
    assert "Resuming stage 1 of 1 after step 24" in said
    assert f"epoch {epochs} of {epochs}" in said
    assert 0.97 * TARGET <= OUT.stat().st_size <= TARGET


def test_a_full_disk_does_not_end_the_training(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, real = runs.whole(), Packed.save

    def save(packed: Packed, path: Path, **options: Any) -> int:
        if path == BEST:
            raise ResourceError("out.checkpoints: no space left on device")
        return real(packed, path, **options)

    monkeypatch.setattr(Packed, "save", save)
    runs(0)
    assert OUT.read_bytes() == whole
    line = "the best file so far is not kept: out.checkpoints: no space left on device; the training goes on"
    assert caplog.messages.count(line) > 1


@pytest.fixture
def drops(runs: Runs) -> Runs:
    runs.words = (*runs.words[:-2], "--max-drop", "9")
    return runs


def test_with_a_drop_the_file_becomes_smaller_and_a_resumed_run_ends_in_the_same(drops: Runs) -> None:
    whole = drops.whole()
    with Path("out.summary.csv").open(newline="") as file:
        targets = [int(row["train_target_size"]) for row in csv.DictReader(file)]
    killed(drops, 15, "--checkpoint-steps", "7")
    drops(0, "--resume")
    assert OUT.read_bytes() == whole
    drops(0, "--force", "--epochs", "0")
    assert len(whole) < OUT.stat().st_size
    assert targets[0] > targets[1] > targets[2] == targets[3]


def test_with_a_drop_the_smallest_file_within_it_is_delivered(drops: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    values, sizes, real = iter((1.0, 1.0, 1.0, -0.5, -0.5, -0.5)), list[int](), Packed.to_bytes
    monkeypatch.setattr("compressor.cli.so_far.evaluate", lambda *_: SimpleNamespace(top1=next(values)))

    def noted(packed: Packed, codec: str) -> bytes:
        data = real(packed, codec)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(Packed, "to_bytes", noted)
    said = drops(0, "--json")
    (line,) = [line for line in said.splitlines() if line.startswith("the file is the best so far")]
    assert line == f"the file is the best so far: {min(sizes[:3]):,} bytes, validation 100.0 %"
    with PackedFile.open(OUT) as file:
        assert file.provenance["target"]["drop"] < 0
        assert "validation" not in file.provenance


def test_no_file_is_kept_where_no_target_is_asked_for(runs: Runs) -> None:
    runs.words = runs.words[:-2]
    said = runs(7, "--bits", "2", at=9, act=tell(signal.SIGINT))
    assert "best file" not in said
    assert NAME not in kept()
