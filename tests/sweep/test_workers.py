"""Workers of a sweep: each row is a process, what ends is recorded once, and whatever dies is taken over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compressor.sweep.grid import Row, rows_of
from compressor.sweep.leases import SoleLeases
from compressor.sweep.ledger import Entry, Ledger
from compressor.sweep.outcome import Outcome
from compressor.sweep.workers import RowCommand, Worker

pytestmark = pytest.mark.slow  # processes are launched, and killed

# Stands for a run: after a while it prints a document; where the descriptor is closed, it ends as one that is stopped.
RUN = """
import json, os, select, sys, time
name, seconds, folder, descriptor = sys.argv[1], float(sys.argv[2]), sys.argv[3], int(sys.argv[4])
with open(folder + "/started", "a") as file:
    print(name, file=file)
if select.select([descriptor], [], [], seconds)[0]:
    sys.exit(7)
if name == "bits9":
    print("error: no room", file=sys.stderr)
    sys.exit(6)
totals = {"file": 10, "dense": 80, "parameters": 20}
print(json.dumps({"model": {"name": "tiny", "args": {}}, "file": name, "seed": 0, "totals": totals}))
sys.exit(5 if name == "bits8" else 0)
"""

SPOILT = json.dumps(
    {"model": {"name": "x"}, "file": "x", "seed": 0, "totals": {"file": -1, "dense": 80, "parameters": 20}}
)
"""A document with a size that cannot be."""


def command(folder: Path, row: Row, seconds: float = 0.2) -> RowCommand:
    arguments = [sys.executable, "-c", RUN, row.name, str(seconds), str(folder)]
    return RowCommand(f"compress tiny -o {row.name}", arguments, folder / f"{row.name}.log")


def recorded(folder: Path) -> list[str]:
    return sorted(entry.row for entry in Ledger(folder).entries())


def test_all_rows_are_recorded_and_recorded_ones_do_not_run_again(tmp_path: Path) -> None:
    rows = rows_of([{"bits": [1, 2, 3]}])
    for _ in range(2):
        worker = Worker(Ledger(tmp_path), SoleLeases(), lambda row: command(tmp_path, row), jobs=2)
        assert worker.run(rows) == {}
    assert recorded(tmp_path) == ["bits1", "bits2", "bits3"]
    assert sorted((tmp_path / "started").read_text().split()) == ["bits1", "bits2", "bits3"]


def test_a_missed_gate_is_a_result_and_a_failure_is_said_and_tried_by_the_next_command(tmp_path: Path) -> None:
    said: list[tuple[str, str]] = []
    for times in (1, 2):
        worker = Worker(
            Ledger(tmp_path), SoleLeases(), lambda row: command(tmp_path, row, 0),
            on_failure=lambda row, why: said.append((row.name, why)),
        )  # fmt: skip
        assert worker.run(rows_of([{"bits": [8, 9]}])) == {"bits9": "exit code 6: error: no room"}
        assert said == [("bits9", "exit code 6: error: no room")] * times
    assert recorded(tmp_path) == ["bits8"]
    assert (tmp_path / "started").read_text().split() == ["bits8", "bits9", "bits9"]


def test_an_interruption_ends_the_processes_and_keeps_what_had_ended(tmp_path: Path) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    rows = rows_of([{"bits": [1, 2]}])
    slow = {"bits1": 0.0, "bits2": 60.0}
    begun = time.monotonic()
    worker = Worker(
        Ledger(tmp_path), SoleLeases(), lambda row: command(tmp_path, row, slow[row.name]), 2, on_end=interrupt
    )
    with pytest.raises(KeyboardInterrupt):
        worker.run(rows)
    assert time.monotonic() - begun < 30
    assert recorded(tmp_path) == ["bits1"]
    assert Worker(Ledger(tmp_path), SoleLeases(), lambda row: command(tmp_path, row, 0)).run(rows) == {}
    assert recorded(tmp_path) == ["bits1", "bits2"]


def entry(name: str) -> Entry:
    return Entry(name, {}, f"compress tiny -o {name}", 1.0, Outcome("tiny", name, 10, 80, 20))


def add(ledger: Ledger, row: Row) -> None:
    """Does what another worker may do."""
    assert ledger.append(entry(row.name))


def test_a_running_row_that_another_worker_records_is_stopped(tmp_path: Path) -> None:
    ledger, begun = Ledger(tmp_path), time.monotonic()
    worker = Worker(ledger, SoleLeases(), lambda row: command(tmp_path, row, 60), on_start=lambda row: add(ledger, row))
    assert worker.run(rows_of([{"bits": [1]}])) == {}
    assert time.monotonic() - begun < 30
    assert Ledger(tmp_path).entries() == [entry("bits1")]


def test_a_row_that_failed_here_and_was_recorded_by_another_worker_has_not_failed(tmp_path: Path) -> None:
    worker = Worker(
        Ledger(tmp_path), SoleLeases(), lambda row: command(tmp_path, row, 0),
        on_failure=lambda row, _: add(Ledger(tmp_path), row),
    )  # fmt: skip
    assert worker.run(rows_of([{"bits": [9]}])) == {}


@pytest.mark.parametrize("printed", ["{}", "[]", '{"model": 3, "totals": {}}', SPOILT])
def test_what_is_no_document_of_a_run_is_a_failure_of_its_row(tmp_path: Path, printed: str) -> None:
    def odd(row: Row) -> RowCommand:
        one = command(tmp_path, row, 0)
        words = [sys.executable, "-c", "import sys; print(sys.argv[1])", printed]
        return RowCommand(one.shown, words, one.log) if row.name == "bits1" else one

    leases = SoleLeases()
    failed = Worker(Ledger(tmp_path), leases, odd).run(rows_of([{"bits": [1, 2]}]))
    assert list(failed) == ["bits1"]
    assert "what the row printed" in failed["bits1"]
    assert recorded(tmp_path) == ["bits2"]
    assert leases.claim(["bits1"]) == "bits1"  # it was given back


def test_a_process_that_cannot_be_started_is_a_failure_of_its_row(tmp_path: Path) -> None:
    def odd(row: Row) -> RowCommand:
        one = command(tmp_path, row, 0)
        wrong = {"bits1": RowCommand(one.shown, [str(tmp_path / "none")], one.log)}
        wrong["bits2"] = RowCommand(one.shown, one.arguments, tmp_path / "no" / "log")
        return wrong.get(row.name, one)

    leases = SoleLeases()
    failed = Worker(Ledger(tmp_path), leases, odd).run(rows_of([{"bits": [1, 2, 3]}]))
    assert list(failed) == ["bits1", "bits2"]
    assert "cannot be started: [Errno 2]" in failed["bits1"]
    assert recorded(tmp_path) == ["bits3"]
    assert leases.claim(["bits1"]) == "bits1"  # it was given back


# A worker as a process of its own, which the test kills.
WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from compressor.sweep.grid import rows_of
from compressor.sweep.ledger import Ledger
from compressor.sweep.shared_leases import SharedLeases
from compressor.sweep.workers import Worker
from tests.sweep.test_workers import command
folder = Path(sys.argv[2])
leases = SharedLeases(str(folder / "journal.log"), "a sweep", interval=0.2)
worker = Worker(
    Ledger(folder), leases, lambda row: command(folder, row, 0.5),
    on_start=lambda row: print(row.name, flush=True),
)
sys.exit(len(worker.run(rows_of([{"bits": [1, 2, 3, 4], "seed": [0, 1]}]))))
"""


def test_of_three_workers_on_one_journal_one_is_killed_and_every_row_is_there_once(tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="needs the extra sweep")
    words = [sys.executable, "-c", WORKER, str(Path(__file__).parents[2]), str(tmp_path)]
    workers = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert workers[0].stdout is not None
    taken = workers[0].stdout.readline().strip()  # it has a row, and the process of it runs
    os.kill(workers[0].pid, signal.SIGKILL)
    outputs = [worker.communicate(timeout=120)[0].split() for worker in workers]
    assert [worker.returncode for worker in workers] == [-signal.SIGKILL, 0, 0]
    names = [f"bits{bits}-seed{seed}" for bits in (1, 2, 3, 4) for seed in (0, 1)]
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["row"] for line in lines) == names
    by_others = [name for output in outputs[1:] for name in output]
    assert taken in by_others  # taken over
    assert len(by_others) == len(set(by_others))


# A worker that is killed when the process of its row has ended: before the line of the row, or between line and table.
KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from compressor.sweep import ledger
from compressor.sweep.grid import rows_of
from compressor.sweep.leases import SoleLeases
from compressor.sweep.workers import Worker
from tests.sweep.test_workers import command
folder, shared = Path(sys.argv[2]), sys.argv[4] == "shared"
def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
holder, name = {"line": (ledger.Ledger, "_add"), "table": (ledger, "write_atomically")}.get(sys.argv[3], (None, ""))
if holder is not None:
    setattr(holder, name, kill)
leases = SoleLeases()
if shared:
    from compressor.sweep.shared_leases import SharedLeases
    leases = SharedLeases(str(folder / "journal.log"), "a sweep", interval=0.2)
ledger.Ledger(folder).restore_table()
sys.exit(len(Worker(ledger.Ledger(folder), leases, lambda row: command(folder, row)).run(rows_of([{"bits": [1, 2]}]))))
"""


@pytest.mark.parametrize("leases", ["sole", "shared"])
@pytest.mark.parametrize(("before", "runs"), [("line", 2), ("table", 1)])
def test_a_worker_that_is_killed_between_the_end_of_a_row_and_its_record(
    tmp_path: Path, leases: str, before: str, runs: int
) -> None:
    if leases == "shared":
        pytest.importorskip("optuna", reason="needs the extra sweep")
    words = [sys.executable, "-c", KILLED, str(Path(__file__).parents[2]), str(tmp_path)]
    killed = subprocess.run([*words, before, leases], timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert recorded(tmp_path) == (["bits1"] if before == "table" else [])
    assert not (tmp_path / "rows.csv").exists()
    assert subprocess.run([*words, "never", leases], timeout=120, check=False).returncode == 0
    assert recorded(tmp_path) == ["bits1", "bits2"]
    assert sorted((tmp_path / "started").read_text().split()) == ["bits1"] * runs + ["bits2"]
    table = (tmp_path / "rows.csv").read_text().splitlines()
    assert sorted(line.split(",")[0] for line in table) == ["bits1", "bits2", "row"]
