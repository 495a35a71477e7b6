"""What a sweep has found: a line of JSON for every row that has ended, and the same as a table of CSV."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from compressor.formats.errors import FormatError, ResourceError, UsageError, printable
from compressor.formats.io.atomic import write_atomically
from compressor.formats.io.locking import holding
from compressor.report.csv_text import csv_text
from compressor.sweep.grid import Row
from compressor.sweep.outcome import Outcome
from compressor.validation import one_line_errors

__all__ = ["Entry", "Ledger", "waiting_for"]

SCHEMA_VERSION = 1
PAUSE = 0.05  # seconds between two looks at a lock
LINES, TABLE, ROWS = "rows.jsonl", "rows.csv", "rows"
NESTED = "classes"  # is a table of its own, and in the lines alone


@dataclass(frozen=True)
class Entry:
    """A row that has ended.

    Args:
        row: its name.
        options: by which rows differ.
        command: that does the same again.
        seconds: that it took, since it was last begun.
        outcome: its figures.
    """

    row: str
    options: Mapping[str, Any]
    command: str
    seconds: float
    outcome: Outcome

    def line(self) -> str:
        """Returns the entry as a line of JSON."""
        facts = {**asdict(self), "options": dict(self.options)}
        return json.dumps({"schema_version": SCHEMA_VERSION, **facts}, default=str)

    @classmethod
    def from_line(cls, line: bytes, where: str) -> Entry:
        """Reads a line, which may be of a stranger.

        Args:
            line: of JSON.
            where: it stands, for errors.

        Raises:
            FormatError: it is none that ``line`` has written.
        """
        try:
            facts = json.loads(line)
        except ValueError as exc:
            raise FormatError(f"{where}: not JSON ({exc})") from exc
        if not isinstance(facts, dict) or facts.get("schema_version") != SCHEMA_VERSION:
            raise FormatError(f"{where}: not a row of schema version {SCHEMA_VERSION}")
        with one_line_errors(FormatError, lambda path: f"{where}: {printable(path)}", show_value=False):
            return _adapter().validate_python(facts)


@cache
def _adapter() -> TypeAdapter[Entry]:
    return TypeAdapter(Entry)


class Ledger:
    """The rows of a sweep that have ended, in its folder. Several processes may append at once: each row is there once.

    ``rows.jsonl`` only grows, a line at a time, which is on disk before ``append`` returns; what a process that was
    killed has left of a line is dropped by the next one. ``rows.csv`` is written anew from it.

    Args:
        folder: of the sweep.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / LINES

    @property
    def rows(self) -> Path:
        """The folder of the files of the rows."""
        return self.folder / ROWS

    def file_of(self, entry: Entry) -> Path:
        """Returns the packed file of a row, wherever the folder of the sweep is now."""
        return self.rows / Path(entry.outcome.file).name

    def entries(self) -> list[Entry]:
        """Reads the rows that have ended, in the order in which they did.

        Raises:
            FormatError: a line is none that ``append`` has written.
        """
        lines = enumerate(self._whole_lines(), 1)
        return [Entry.from_line(line, f"{self.path}, line {number}") for number, line in lines]

    def recorded(self, rows: Iterable[Row]) -> set[str]:
        """Returns the names of those of some rows that have ended.

        Raises:
            UsageError: a row has the name of another one that has ended.
            FormatError: as for ``entries``.
        """
        ended = {entry.row: dict(entry.options) for entry in self.entries()}
        same = {row.name: json.loads(json.dumps(dict(row.options), default=str)) for row in rows if row.name in ended}
        for name, options in same.items():
            if options != ended[name]:
                raise UsageError(
                    f"{self.path} has a row {name} of {ended[name]}, not of {options}: give another folder with -o"
                )
        return set(same)

    def append(self, entry: Entry) -> bool:
        """Adds a row, and returns whether it was not there yet.

        Raises:
            ResourceError: the folder cannot be written.
            FormatError: as for ``entries``.
        """
        with waiting_for(self.path):
            entries = self.entries()
            is_new = all(entry.row != one.row for one in entries)
            if is_new:
                self._add(entry.line().encode() + b"\n")
                entries.append(entry)
            self._write_table(entries)
        return is_new

    def restore_table(self) -> None:
        """Writes the table anew: a process may have been killed after the last line, and before the table."""
        with waiting_for(self.path):
            if entries := self.entries():
                self._write_table(entries)

    def _write_table(self, entries: list[Entry]) -> None:
        write_atomically(self.folder / TABLE, _table(entries).encode(), force=True)

    def _add(self, line: bytes) -> None:
        whole = sum(map(len, self._whole_lines(keep_ends=True)))
        try:
            with self.path.open("ab") as file:
                file.truncate(whole)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as exc:
            raise ResourceError(f"{self.path} cannot be written: {exc.strerror or exc}") from exc

    def _whole_lines(self, keep_ends: bool = False) -> list[bytes]:
        """Returns the lines that were written to their end."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return []
        return content[: content.rfind(b"\n") + 1].splitlines(keep_ends)


@contextmanager
def waiting_for(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds the lock of a file within the ``with`` block, as soon as no other process does.

    Args:
        path: of the file.
        on_wait: called once where another process holds the lock.
    """
    with ExitStack() as stack:
        has_waited = False
        while True:
            try:
                stack.enter_context(holding(path))
                break
            except ResourceError:
                if not has_waited:
                    on_wait()
                has_waited = True
            time.sleep(PAUSE)
        yield


def _table(entries: list[Entry]) -> str:
    """Returns the rows as CSV, a column for each option by which any of them differ."""
    options = list(dict.fromkeys(key for entry in entries for key in entry.options))
    figures = [key for key in asdict(entries[0].outcome) if key not in (*options, NESTED)]
    rows: list[list[Any]] = [["row", *options, *figures, "seconds", "command"]]
    for entry in entries:
        outcome = {**asdict(entry.outcome), "missed": "; ".join(entry.outcome.missed)}
        values = [*(entry.options.get(key) for key in options), *(outcome[key] for key in figures)]
        rows.append([entry.row, *values, entry.seconds, entry.command])
    return csv_text(rows)
