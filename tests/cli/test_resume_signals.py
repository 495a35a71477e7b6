"""Runs that are told to stop, by each of the signals a user or a machine sends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compressor.cli.main import run
from tests.helpers.runs import FOLDER, OUT, Runs, _here, kept, runs, tell, weights

__all__ = ["_here", "runs", "weights"]  # the fixtures


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_one_signal_finishes_the_step_and_saves(runs: Runs, number: signal.Signals) -> None:
    whole = runs.whole()
    before = signal.getsignal(number)
    said = runs(7, at=9, act=tell(number)).splitlines()
    assert "stopping after this step; once more, to stop at once" in said
    assert said[-1] == (
        "error: stopped after step 10 of 24, which is kept in out.checkpoints: the same command with --resume goes on"
    )
    assert signal.getsignal(number) == before
    assert not OUT.exists()
    assert kept() == ["01-0000000006.safetensors", "01-0000000010.safetensors"]
    assert "Resuming stage 1 of 1 after step 10, from out.checkpoints" in runs(0, "--resume")
    assert OUT.read_bytes() == whole
    assert not FOLDER.exists()


def test_a_second_signal_ends_at_once(runs: Runs) -> None:
    assert runs(130, at=9, act=tell(signal.SIGINT, 2)).splitlines()[-1] == "interrupted"
    assert kept() == ["01-0000000000.safetensors", "01-0000000006.safetensors"]
    for number, code in ((signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        with pytest.raises(SystemExit) as ended:
            runs(0, "--force", at=9, act=tell(number, 2))
        assert ended.value.code == code


def test_a_signal_between_trainings(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing kept it is as without checkpoints; at the end, the whole training is kept."""
    whole = runs.whole()

    def instead(name: str, number: int) -> Callable[..., Any]:
        return lambda *_, **__: signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr("compressor.cli.weights.create_model", instead("model", signal.SIGINT))
        assert runs(130).splitlines()[-1] == "interrupted"
        patch.setattr("compressor.cli.weights.create_model", instead("model", signal.SIGTERM))
        with pytest.raises(SystemExit):
            runs(0)
    assert not FOLDER.exists()
    with monkeypatch.context() as patch:
        patch.setattr("compressor.cli.run._write", instead("file", signal.SIGTERM))
        said = runs(7)
    assert said.endswith("stopped; out.checkpoints keeps how far it had come: the same command with --resume "
                         "goes on\n")  # fmt: skip
    assert " epoch 1" not in runs(0, "--resume")  # nothing is left to train
    assert OUT.read_bytes() == whole


def test_an_ignored_signal_stays_ignored(runs: Runs) -> None:
    """As nohup has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        runs(0, at=9, act=tell(signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert OUT.exists()


def test_no_signal_handlers_outside_the_main_thread(runs: Runs) -> None:
    whole = runs.whole()
    thread = threading.Thread(target=run, args=([*runs.words],))
    thread.start()
    thread.join()
    assert OUT.read_bytes() == whole
    assert not FOLDER.exists()


@pytest.mark.slow
def test_ctrl_c(tmp_path: Path) -> None:
    # Where the tests run in the background, the shell has them ignore Ctrl-C, and a child would inherit that.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from compressor.cli.main import main; main(['test_resnet', '--baseline-epochs', '500'])"
    )
    environment = {**os.environ, "TIMM_COMPRESSOR_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        while "epoch 1 of 500" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 7
    first, *_, last = said.splitlines()
    assert "stopping after this step; once more, to stop at once" in first + last
    assert last.startswith("error: stopped after step ")
    assert last.endswith(": the same command with --resume goes on")
    assert "Traceback" not in said
    assert not list(tmp_path.glob("*.safetensors"))
