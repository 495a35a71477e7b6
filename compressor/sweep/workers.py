"""A worker of a sweep: it runs rows, each in a process of its own, and records those that end."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from compressor.formats.errors import InterruptionError, QualityError
from compressor.sweep.grid import Row
from compressor.sweep.leases import Leases
from compressor.sweep.ledger import Entry, Ledger
from compressor.sweep.outcome import Outcome

__all__ = ["RowCommand", "Worker"]

PAUSE = 0.1  # seconds between two looks at the processes
LOOK = 1.0  # seconds between two looks at what others do
ENDED = 0, QualityError.exit_code  # a gate that is missed is a result, too
STOPPED = InterruptionError.exit_code


@dataclass(frozen=True)
class RowCommand:
    """How a row is run.

    Args:
        shown: the command that does the same.
        arguments: of the process, which prints the document of the run on stdout. The last is that of a descriptor to
            watch: where it is closed, this worker has ended, and so must the process.
        log: file of its stderr.
    """

    shown: str
    arguments: Sequence[str]
    log: Path


class _Running:
    """The process of a row."""

    def __init__(self, row: Row, command: RowCommand) -> None:
        self.row, self.command, self.started = row, command, time.monotonic()
        self.is_stopped = False
        self.output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed when the row has ended)
        watched, self._alive = os.pipe()
        try:
            with command.log.open("wb") as log:
                self.process = subprocess.Popen(
                    [*command.arguments, str(watched)], stdin=subprocess.DEVNULL, stdout=self.output, stderr=log,
                    pass_fds=(watched,), start_new_session=True,
                )  # fmt: skip
        finally:
            os.close(watched)

    def stop(self) -> None:
        """Lets the process know that it must end; it saves how far it has come."""
        self.is_stopped = True
        if self._alive >= 0:
            os.close(self._alive)
            self._alive = -1

    def close(self) -> None:
        self.stop()
        self.output.close()

    def document(self) -> dict[str, Any] | None:
        """Returns what the process has printed; None where that is no document."""
        self.output.seek(0)
        try:
            document: dict[str, Any] = json.loads(self.output.read())
        except ValueError:
            return None
        return document


class Worker:
    """Runs the rows of a sweep that are not recorded yet, until all are recorded or have failed.

    Args:
        ledger: of the sweep.
        leases: of its rows.
        command: says how a row is run.
        jobs: number of processes at once.
        on_start, on_end: called for each row, with the recorded entry at its end.
        on_failure: called for each row that failed, with the reason.
        on_wait: called once, with the rows that other workers are running, when there is nothing else to do.
    """

    def __init__(
        self,
        ledger: Ledger,
        leases: Leases,
        command: Callable[[Row], RowCommand],
        jobs: int = 1,
        on_start: Callable[[Row], None] = lambda _: None,
        on_end: Callable[[Entry], None] = lambda _: None,
        on_failure: Callable[[Row, str], None] = lambda *_: None,
        on_wait: Callable[[list[str]], None] = lambda _: None,
    ) -> None:
        self.ledger, self.leases, self.command, self.jobs = ledger, leases, command, jobs
        self.on_start, self.on_end, self.on_failure, self.on_wait = on_start, on_end, on_failure, on_wait
        self._running: list[_Running] = []

    def run(self, rows: Sequence[Row]) -> dict[str, str]:
        """Runs the rows; returns why rows failed, by name.

        Whatever ends this function ends its processes, which save how far they have come; one that has ended meanwhile
        is recorded.
        """
        by_name = {row.name: row for row in rows}
        look, has_waited = 0.0, False
        try:
            while True:
                self._end_all()
                if time.monotonic() >= look:
                    waiting, started = self._start(by_name)
                    look = time.monotonic() + LOOK
                    if not waiting and not self._running:
                        return {name: why for name, why in self.leases.failed().items() if name in by_name}
                    if waiting and not self._running and not started and not has_waited:
                        self.on_wait(waiting)
                        has_waited = True
                time.sleep(PAUSE)
        finally:
            self._stop()

    def _start(self, by_name: dict[str, Row]) -> tuple[list[str], int]:
        """Starts rows that are free; returns those that are neither recorded nor failed, and how many were started."""
        recorded = {entry.row for entry in self.ledger.entries()} | self.leases.failed().keys()
        waiting, started = [name for name in by_name if name not in recorded], 0
        while len(self._running) < self.jobs and (name := self.leases.claim(waiting)) is not None:
            if name in {entry.row for entry in self.ledger.entries()}:  # another worker has just recorded it
                self.leases.release(name)
                waiting.remove(name)
                continue
            self.on_start(by_name[name])
            self._running.append(_Running(by_name[name], self.command(by_name[name])))
            started += 1
        return waiting, started

    def _end_all(self) -> None:
        """Records the processes that have ended, and stops those whose rows others have taken over."""
        lost = self.leases.beat()
        for one in list(self._running):
            if one.row.name in lost:
                one.stop()
            if one.process.poll() is not None:
                self._running.remove(one)
                self._end(one)

    def _end(self, one: _Running) -> None:
        with contextlib.closing(one):
            code, document = one.process.returncode, one.document()
            error = None
            if code in ENDED and document is not None:
                seconds = round(time.monotonic() - one.started, 1)
                entry = Entry(one.row.name, one.row.options, one.command.shown, seconds, Outcome.of(document))
                if self.ledger.append(entry):
                    self.on_end(entry)
            elif not one.is_stopped and code != STOPPED:
                error = f"exit code {code}: {_last_line(one.command.log)}"
                self.on_failure(one.row, error)
            self.leases.release(one.row.name, error)

    def _stop(self) -> None:
        """Stops all processes, and records those that had ended."""
        for one in self._running:
            one.stop()
        for one in self._running:
            one.process.wait()
            self._end(one)
        self._running.clear()


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "no log"
    return next((line for line in reversed(lines) if line.strip()), "no message")
