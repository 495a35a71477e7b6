"""Runs on pictures, which processes of their own open: killed, resumed, and of one colour."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from compressor.data.datasets import load_data
from compressor.formats.file.reader import PackedFile
from tests.helpers.runs import OUT, Runs, _here, killed, runs, weights

__all__ = ["_here", "runs", "weights"]  # the fixtures


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    random = np.random.RandomState(0)
    for split, count in (("train", 10), ("val", 2)):
        for name in ("a", "b"):
            (tmp_path / "own" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.randint(0, 256, (40, 40, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "own" / split / name / f"{number}.png")
    monkeypatch.setattr("compressor.cli.setup.load_data", load_data)
    monkeypatch.setattr("compressor.data.images.os.cpu_count", lambda: 2)
    return tmp_path / "own"


OWN = ("tiny", "--data-dir", "own", "--img-size", "32", "--epochs", "3", "--baseline-epochs", "1", "--batch-size", "4",
       "-o", "out")  # fmt: skip


@pytest.mark.slow
def test_a_killed_data_worker(runs: Runs, pictures: Path) -> None:
    """A line names it; what was kept is gone on from, in this process alone, to the same file."""
    runs.words = (*OWN, "--in-chans", "3")
    whole = runs.whole()

    def kill() -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid or 0, signal.SIGKILL)
            child.join()

    said = runs.refused(6, "--checkpoint-steps", "1", at=7, act=kill)
    assert re.fullmatch(
        r"DataLoader worker \(pid(\(s\))? [\d, ]+\) (is killed by signal: Killed|exited unexpectedly): a process that "
        r"opens images died; try --workers 0",
        said,
    )
    # The loader may find out a step later: a batch was ready.
    assert re.search(r"after step \d+,", runs(0, "--resume", "--workers", "0"))
    assert OUT.read_bytes() == whole


def test_grey_images(runs: Runs, pictures: Path) -> None:
    """Of a model made for colours; the normalisation is the mean of its own."""
    runs.words = ("test_resnet", *OWN[1:], "--workers", "0")
    runs(0, "--in-chans", "1")
    with PackedFile.open(OUT) as file:
        known = dict(file.preprocessing or {})
    assert (known["input_size"], len(known["mean"]), len(known["std"])) == ([1, 32, 32], 1, 1)
    assert runs.refused(2, "--in-chans", "4", "--force") == "--in-chans 4: images are opened with 1 channel or with 3"


@pytest.mark.slow
def test_images_opened_by_workers(runs: Runs, pictures: Path) -> None:
    """What is random about a picture follows from its place in the order, and so does not depend on the process."""
    runs.words = (*OWN, "--in-chans", "3")
    whole = runs.whole()
    killed(runs, 8, "--checkpoint-steps", "1")
    assert "after step 8" in runs(0, "--resume")
    assert OUT.read_bytes() == whole
    killed(runs, 8, "--force")
    OUT.unlink()
    (pictures / "train" / "a" / "0.png").unlink()
    said = runs.refused(2, "--resume")
    assert said.startswith('out.checkpoints holds another run: data.version was "pictures-')
