"""``compress sweep`` in processes that are killed: what has been done is kept, and nothing is done twice."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from compressor.cli.main import run

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
COMMAND = "test_resnet --bits 2 --baseline-epochs 1 --epochs 1 --batch-size 32 --calibration none --checkpoint-steps 5"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def words_of(options: str) -> list[str]:
    return [sys.executable, "-m", "compressor", "sweep", *COMMAND.split(), *options.split(), "-o", "s"]


def go_on(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True)


def kill(words: list[str], is_time: Callable[[], bool]) -> None:
    """Kills the worker of a sweep by SIGKILL when it is time, and not before it has come so far."""
    worker = subprocess.Popen(words, env=ENVIRONMENT)
    while not is_time():
        assert worker.poll() is None
        time.sleep(0.02)
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()


def test_a_sweep_that_is_killed_and_begun_again_has_each_row_once_and_one_dense_model(own_folder: Path) -> None:
    """Two seeds of one model: the training of the second is under way when its worker is killed."""
    words, folder = words_of("--seed 0,1"), own_folder / "s"
    lines, second = folder / "rows.jsonl", folder / "rows" / "bits2-calibrationnone-epochs1-seed1.safetensors"
    checkpoints = second.with_name(f"{second.name}.checkpoints")
    kill(words, lambda: lines.exists() and any(checkpoints.glob("0*")))
    done = go_on(words)
    assert done.returncode == 0, done.stderr
    assert "2 rows in s, 1 of them done before" in done.stderr
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [row["options"]["seed"] for row in rows] == [0, 1]
    assert len({row["outcome"]["dense_top1"] for row in rows}) == 1
    assert "Resuming stage 1" in second.with_suffix(".log").read_text()
    for row in rows:
        assert (folder / "rows" / f"{row['row']}.safetensors").stat().st_size == row["outcome"]["bytes"]
        assert "--checkpoint-path s/dense.safetensors --dataset digits" in row["command"]
    again = go_on(words)
    assert (again.returncode, lines.read_text().count("\n")) == (0, 2)
    assert "2 of them done before" in again.stderr
    assert run(["report", "s", "--format", "csv", "-o", "table.csv"]) == 0
    assert Path("table.csv").read_text().count("\n") == 2  # heads, and the mean over seeds


def test_a_row_of_two_processes_is_killed_and_goes_on_to_the_file_of_its_command(own_folder: Path) -> None:
    words = words_of("--device cpu --processes-per-row 2")
    row = own_folder / "s" / "rows" / "bits2-calibrationnone-epochs1.safetensors"
    kill(words, lambda: any(row.with_name(f"{row.name}.checkpoints").glob("01-*.safetensors")))
    done = go_on(words)
    assert done.returncode == 0, done.stderr
    assert "Resuming stage 1" in row.with_suffix(".log").read_text()
    (line,) = (own_folder / "s" / "rows.jsonl").read_text().splitlines()
    shown = shlex.split(json.loads(line)["command"])
    assert shown[:5] == ["torchrun", "--nproc-per-node", "2", "-m", "compressor.cli"]
    alone = subprocess.run([sys.executable, *shown[3:-1], "alone.safetensors"], env=ENVIRONMENT, check=False)
    by_hand = [sys.executable, "-m", "torch.distributed.run", "--standalone", *shown[1:-1], "two.safetensors"]
    two = subprocess.run(by_hand, env=ENVIRONMENT, check=False)
    assert (alone.returncode, two.returncode) == (0, 0)
    assert row.read_bytes() == Path("two.safetensors").read_bytes() != Path("alone.safetensors").read_bytes()
