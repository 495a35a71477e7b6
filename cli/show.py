"""What the commands print: tables and JSON on stdout, steps and progress on stderr."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from textwrap import fill
from typing import TYPE_CHECKING, Any, TextIO

import click

from compressor.report.interval import interval_text
from compressor.report.schema import with_units
from compressor.training.progress_bar import epoch_figures, make_bar, percent

if TYPE_CHECKING:
    from compressor.training.evaluation import Evaluation
    from compressor.training.loop import Epoch

__all__ = [
    "WHOLE_WORDS",
    "Invocation",
    "Step",
    "accuracy_line",
    "class_rows",
    "counts",
    "echo",
    "json_text",
    "percent",
    "print_json",
    "print_table",
    "say",
    "styled",
    "width",
]

WHOLE_WORDS: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
UNKNOWN = sys.maxsize  # columns of a stream that is no terminal
LEAST, GAP = 16, 2  # columns of a terminal that a column of a table keeps where it is cut, and between them
LINE, POSTFIX = 10.0, 1.0  # seconds between two lines, and between two readings of the loss for the bar


def say(text: str, indent: int = 2) -> None:
    """Prints text on stderr, in lines that break between words where the width is known.

    Args:
        text: of one line.
        indent: columns before the lines after the first.
    """
    click.echo(_filled(text, _columns(sys.stderr, UNKNOWN), indent), err=True)


def echo(text: str, indent: int = 2) -> None:
    """Prints text on stdout, likewise; ``indent`` as for ``say``."""
    click.echo(_filled(text, width(), indent))


def _filled(text: str, columns: int, indent: int) -> str:
    return fill(text, columns, subsequent_indent=" " * indent, **WHOLE_WORDS)


@dataclass(frozen=True)
class Invocation:
    """A command as it was typed, and when.

    Args:
        arguments: the words after ``compress``.
        date: of its start.
        started: the same by the monotonic clock, in seconds.
    """

    arguments: Sequence[str]
    date: datetime = field(default_factory=lambda: datetime.now(UTC))
    started: float = field(default_factory=time.monotonic)

    def to_dict(self) -> dict[str, Any]:
        """Returns command, date, seconds so far, and versions as JSON values."""
        return {
            "command": ["compress", *self.arguments],
            "date": self.date.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self.started, 3),
            "versions": {name: version(name) for name in ("timm-compressor", "timm", "torch")},
        }


def styled(text: str, **style: Any) -> str:
    """Returns text in colour or bold, for ``click.echo``, which takes that off where there is no terminal.

    Args:
        text: the text.
        style: as for ``click.style``; none of it is used where ``NO_COLOR`` is set.
    """
    return text if os.environ.get("NO_COLOR") else click.style(text, **style)


def print_json(document: Mapping[str, Any]) -> None:
    """Prints one JSON document, as ``json_text`` returns it."""
    click.echo(json_text(document))


def json_text(document: Mapping[str, Any]) -> str:
    """Returns a JSON document: what all have in common, the command and its time among it, and then its own keys."""
    context = click.get_current_context(silent=True)
    invocation = None if context is None else context.find_object(Invocation)
    facts = {} if invocation is None else invocation.to_dict()
    return json.dumps(with_units({**facts, **document}), indent=2, default=str)


def print_table(rows: Sequence[Sequence[Any]], spare: Collection[str] = ()) -> None:
    """Prints rows in aligned columns, no wider than may be where the longest phrases can take several lines.

    Args:
        rows: of cells; the first is the head, where columns can be spared.
        spare: heads of columns that are left out where all would be too wide.
    """
    from tabulate import tabulate

    columns = [[str(cell) for cell in column] for column in zip(*rows, strict=True)]
    if _excess(columns) > 0:
        columns = [column for column in columns if column[0] not in spare]
    widths, excess = [max(map(len, column)) for column in columns], _excess(columns)
    has_words = [any(" " in cell for cell in column) for column in columns]
    for number in sorted(range(len(columns)), key=lambda number: (not has_words[number], -widths[number])):
        cut = min(max(excess, 0), max(widths[number] - LEAST, 0))
        if cut:  # tabulate's own way to cut cells takes 2,304 for a whole number of Python
            columns[number] = [fill(cell, widths[number] - cut) for cell in columns[number]]
            excess -= cut
    click.echo(tabulate(list(zip(*columns, strict=True)), tablefmt="plain", disable_numparse=True))


def _excess(columns: Sequence[Sequence[str]]) -> int:
    """Returns by how many characters the columns of a table are wider than may be."""
    return sum(max(map(len, column)) for column in columns) + GAP * (len(columns) - 1) - width()


def width() -> int:
    """Returns the columns that a table may take: those of the terminal or of ``COLUMNS``, or 140 where neither is."""
    return _columns(sys.stdout, 140)


def _columns(stream: TextIO, unknown: int) -> int:
    """Returns the columns of a stream's terminal; elsewhere those that ``COLUMNS`` says, or ``unknown``."""
    if stream.isatty() and not os.environ.get("COLUMNS"):
        with suppress(OSError, ValueError):
            return os.get_terminal_size(stream.fileno()).columns or unknown
    return shutil.get_terminal_size((unknown, 24)).columns if os.environ.get("COLUMNS") else unknown


class Step:
    """One numbered step of a run: on a terminal a bar, elsewhere lines; and a line at its end.

    Args:
        number: such as ``1/4``.
        name: of the work, such as ``fine-tuning``.
    """

    def __init__(self, number: str, name: str) -> None:
        self.head = f"{number} {name:<15}"
        self.started = time.monotonic()
        self.bar: Any = None
        self.first = 0  # optimiser steps that were done before, by a run that is resumed
        self.shown = -math.inf  # time of the last line, or of the last reading of the loss

    def on_step(self, done: int, total: int, loss: Any) -> None:
        """Moves the bar on; where there is none, prints a line every ten seconds.

        Args:
            done, total: optimiser steps.
            loss: mean of the epoch so far, a scalar tensor; it is read only where it is shown.
        """
        if self.bar is None:
            self.first = done - 1
            self.bar = make_bar(self.head, total, self.first)
            self.shown = -math.inf if not self.bar.disable else time.monotonic()
        due = time.monotonic() - self.shown >= (LINE if self.bar.disable else POSTFIX)
        if due:
            self.shown, figure = time.monotonic(), f"loss {float(loss):.3f}"
            if self.bar.disable:
                say(f"{self.head}step {done} of {total}  {figure}  {self.clock()}, {self.left(done, total)} left")
            else:
                self.bar.set_postfix_str(figure, refresh=False)
        if not self.bar.disable:
            self.bar.update(done - self.bar.n)

    def on_epoch(self, epoch: Epoch, top1: float | None = None) -> None:
        """Prints a line with the figures of an epoch, above the bar where there is one."""
        self.shown = time.monotonic()
        if self.bar is not None:
            self.bar.clear()
        self._say(f"{epoch_figures(epoch, top1)}  {self.clock()}")

    def done(self, text: str) -> None:
        """Removes the bar, and prints the line of the step."""
        if self.bar is not None:
            self.bar.close()
        self._say(f"{text}  {self.clock()}")

    def _say(self, text: str) -> None:
        """Prints text after the head of the step; on a terminal, in lines that break between words."""
        shown = _filled(f"{self.head}{text}", _columns(sys.stderr, UNKNOWN), len(self.head))
        click.echo(styled(self.head, fg="cyan") + shown[len(self.head) :], err=True)

    def clock(self) -> str:
        """Returns minutes and seconds since the step began."""
        return _minutes(time.monotonic() - self.started)

    def left(self, done: int, total: int) -> str:
        """Returns minutes and seconds until the last optimiser step, if all take as long as those so far."""
        taken = time.monotonic() - self.started
        return _minutes(taken / max(done - self.first, 1) * (total - done))


def _minutes(seconds: float) -> str:
    """Returns minutes and seconds.

    >>> _minutes(89.6)
    '1:30'
    """
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02}"


def counts(number: float) -> str:
    """Returns a count of weights in a few characters.

    >>> counts(21_284_672), counts(1234), counts(12)
    ('21.3 M', '1.2 k', '12')
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:g}"


def accuracy_line(packed: Evaluation, dense: Evaluation | None, split: str, seed: int, compared: str = "dense") -> str:
    """Returns a line with top-1 before and after, n, the 95 % interval, the images lost and gained, and the seed.

    Args:
        packed: of the packed file.
        dense: of what it is compared with; None: nothing.
        split: of the data, that was evaluated.
        seed: of the run.
        compared: what it is compared with.
    """
    before = f"{compared} {percent(dense.top1)} -> " if dense is not None else ""
    line = f"top-1 on {packed.n:,} {split} images  {before}packed file {percent(packed.top1)}"
    line += f"  95 % interval {interval_text(*packed.interval)}"
    if dense is not None:
        lost, gained = flips(packed, dense)
        line += f"  {lost} {'image' if lost == 1 else 'images'} lost, {gained} gained"
    return f"{line}  seed {seed}"


def flips(packed: Evaluation, dense: Evaluation) -> tuple[int, int]:
    """Counts the images that only the dense model gets right, and those that only the packed one does."""
    return int((dense.correct & ~packed.correct).sum()), int((packed.correct & ~dense.correct).sum())


def class_rows(packed: Evaluation, dense: Evaluation | None, names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns for each class that has images how many there are, and how many are right, lost and gained.

    Args:
        packed, dense: of two models on the same images; without ``dense``, nothing is compared.
        names: of all classes.
    """
    count = len(names)
    columns: dict[str, Sequence[Any]] = {"name": names, "images": packed.count(count)}
    if dense is not None:
        columns["dense"] = dense.count(count, dense.correct)
    columns["packed"] = packed.count(count, packed.correct)
    if dense is not None:
        columns["lost"] = packed.count(count, dense.correct & ~packed.correct)
        columns["gained"] = packed.count(count, packed.correct & ~dense.correct)
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [row for row in rows if row["images"]]
