"""A worker of a sweep: it runs rows, each in a process of its own, and records those that end."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from compressor.formats.errors import FormatError, InterruptionError, QualityError
from compressor.sweep.grid import Row
from compressor.sweep.leases import Leases
from compressor.sweep.ledger import Entry, Ledger
from compressor.sweep.outcome import Outcome
from compressor.sweep.watched import Watched

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
    """The process of a row; OSError where none can be started."""

    def __init__(self, row: Row, command: RowCommand) -> None:
        self.row, self.command, self.started = row, command, time.monotonic()
        self.is_stopped = False
        self.output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed when the row has ended)
        try:
            with command.log.open("wb") as log:
                self.watched = Watched(command.arguments, self.output, log)
        except OSError:
            self.output.close()
            raise

    @property
    def process(self) -> subprocess.Popen[bytes]:
        return self.watched.process

    def stop(self) -> None:
        """Lets the process know that it must end; it saves how far it has come."""
        self.is_stopped = True
        self.watched.let_go()

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

    def entry(self, document: dict[str, Any]) -> Entry:
        """Returns what is recorded of the row.

        Raises:
            FormatError: the document lacks a figure, or has one that cannot be.
        """
        seconds = round(time.monotonic() - self.started, 1)
        try:
            outcome = Outcome.of(document)
        except (KeyError, TypeError, AttributeError) as exc:
            raise FormatError(f"what the row printed is no document of a run ({exc!r})") from exc
        entry = Entry(self.row.name, self.row.options, self.command.shown, seconds, outcome)
        Entry.from_line(entry.line().encode(), "what the row printed")  # a line that cannot be read spoils the record
        return entry


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
                        missing = by_name.keys() - self._recorded()  # others may have recorded what failed here
                        return {name: why for name, why in self.leases.failed().items() if name in missing}
                    if waiting and not self._running and not started and not has_waited:
                        self.on_wait(waiting)
                        has_waited = True
                time.sleep(PAUSE)
        finally:
            self._stop()

    def _recorded(self) -> set[str]:
        return {entry.row for entry in self.ledger.entries()}

    def _start(self, by_name: dict[str, Row]) -> tuple[list[str], int]:
        """Starts rows that are free; returns those that are neither recorded nor failed, and how many were started.

        A running row that another worker has recorded meanwhile is stopped before it writes its file over theirs.
        """
        recorded = self._recorded()
        for one in self._running:
            if one.row.name in recorded:
                one.stop()
        settled = recorded | self.leases.failed().keys()
        waiting, started = [name for name in by_name if name not in settled], 0
        while len(self._running) < self.jobs and (name := self.leases.claim(waiting)) is not None:
            if name in self._recorded():  # another worker has just recorded it
                self.leases.release(name)
                waiting.remove(name)
                continue
            self.on_start(by_name[name])
            try:
                self._running.append(_Running(by_name[name], self.command(by_name[name])))
                started += 1
            except OSError as exc:
                waiting.remove(name)
                self._fail(by_name[name], f"cannot be started: {exc}")
        return waiting, started

    def _fail(self, row: Row, why: str) -> None:
        self.on_failure(row, why)
        self.leases.release(row.name, why)

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
        why = None
        with contextlib.closing(one):
            try:
                why = self._record(one)
            finally:
                if why is None:
                    self.leases.release(one.row.name)
            if why is not None:
                self._fail(one.row, why)

    def _record(self, one: _Running) -> str | None:
        """Records a row whose process has ended; returns why it failed, None where it did not, or was stopped."""
        code, document = one.process.returncode, one.document()
        if code in ENDED and document is not None:
            try:
                entry = one.entry(document)
            except FormatError as exc:
                return str(exc)
            if self.ledger.append(entry):
                self.on_end(entry)
        elif not one.is_stopped and code != STOPPED:
            return f"exit code {code}: {_last_line(one.command.log)}"
        return None

    def _stop(self) -> None:
        """Stops all processes, and records those that had ended."""
        for one in self._running:
            one.stop()
        with contextlib.ExitStack() as stack:  # one that cannot be recorded keeps no other one
            for one in reversed(self._running):
                stack.callback(self._end, one)
                stack.callback(one.process.wait)
            self._running.clear()


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "no log"
    return next((line for line in reversed(lines) if line.strip()), "no message")
