"""Processes that are started together: their ranks, what they print, their exit codes, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Starts two processes as a row does, and ends with their code.
LEADER = """
import sys
from compressor.sweep.together import run_together
sys.exit(run_together([sys.executable, "-c", sys.argv[1], *sys.argv[2:]], 2))
"""
TOLD = """
import os, sys
names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"
print(*(os.environ[name] for name in names), flush=True)
open(sys.argv[1] + "/" + os.environ["RANK"], "w").write(os.environ["MASTER_PORT"])
"""
ENDS = """
import os, sys
code = int(sys.argv[1 + int(os.environ["RANK"])])
os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)
"""
# Notes that it was told to end, which takes a while, and ends with the code of a run that was stopped.
STOPPED = """
import os, signal, sys, time
from compressor.sweep.watched import end_with
name = sys.argv[1] + "/" + os.environ["RANK"]
def stop(*_):
    time.sleep(0.2)
    open(name, "w").write("stopped")
    sys.exit(7)
signal.signal(signal.SIGTERM, stop)
end_with(int(sys.argv[-1]))
open(name, "w").write("runs")
time.sleep(60)
"""


def leader(program: str, *arguments: object) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", LEADER, program, *map(str, arguments)]
    return subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)


def until_both_say(folder: Path, text: str) -> None:
    end = time.monotonic() + 60
    while [(folder / rank).exists() and (folder / rank).read_text() for rank in "01"] != [text, text]:
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def stopped(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    one = leader(STOPPED, tmp_path)
    try:
        until_both_say(tmp_path, "runs")
        yield one
    finally:
        one.kill()
        one.communicate()


def test_each_has_its_rank_and_the_first_alone_prints(tmp_path: Path) -> None:
    one = leader(TOLD, tmp_path)
    assert one.communicate(timeout=60)[0] == "0 0 2 2 127.0.0.1\n"
    assert one.returncode == 0
    ports = [(tmp_path / rank).read_text() for rank in "01"]
    assert ports[0] == ports[1]
    assert int(ports[0]) > 0


@pytest.mark.parametrize(("codes", "expected"), [((5, 5), 5), ((0, 6), 6), ((6, -signal.SIGKILL), 6), ((-9, 0), 137)])
def test_the_code_is_the_first_that_is_not_zero(codes: tuple[int, int], expected: int) -> None:
    one = leader(ENDS, *codes)
    one.communicate(timeout=60)
    assert one.returncode == expected


def test_all_are_told_to_stop(stopped: subprocess.Popen[str], tmp_path: Path) -> None:
    stopped.send_signal(signal.SIGTERM)
    stopped.communicate(timeout=60)
    assert stopped.returncode == 7
    until_both_say(tmp_path, "stopped")


def test_all_end_with_the_one_that_started_them(stopped: subprocess.Popen[str], tmp_path: Path) -> None:
    stopped.kill()
    until_both_say(tmp_path, "stopped")
