"""What the commands print: tables and JSON on stdout, steps and progress on stderr."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from compressor.training.evaluation import Evaluation
    from compressor.training.loop import Epoch

__all__ = ["SCHEMA_VERSION", "Step", "accuracy_line", "counts", "print_json", "print_table", "say", "width"]

SCHEMA_VERSION = 1
LINE, POSTFIX = 10.0, 1.0  # seconds between two lines, and between two readings of the loss for the bar


def say(text: str) -> None:
    """Prints a line on stderr."""
    click.echo(text, err=True)


def print_json(document: Mapping[str, Any]) -> None:
    """Prints one JSON document with the schema version first."""
    click.echo(json.dumps({"schema_version": SCHEMA_VERSION, **document}, indent=2, default=str))


def print_table(rows: Sequence[Sequence[Any]]) -> None:
    """Prints rows in aligned columns."""
    from tabulate import tabulate

    click.echo(tabulate(rows, tablefmt="plain", disable_numparse=True))


def width() -> int:
    """Returns the columns that a table may take: those of the terminal, or 140 where there is none."""
    return shutil.get_terminal_size((140, 24)).columns if sys.stdout.isatty() else 140


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
        self.figures: list[str] = []  # of the last epoch, beside the loss

    def on_step(self, done: int, total: int, loss: Any) -> None:
        """Moves the bar on; where there is none, prints a line every ten seconds.

        Args:
            done, total: optimiser steps.
            loss: mean of the epoch so far, a scalar tensor; it is read only where it is shown.
        """
        from tqdm import tqdm

        if self.bar is None:
            self.first = done - 1
            self.bar = tqdm(
                total=total, initial=self.first, desc=self.head, disable=None, leave=False, file=sys.stderr, unit="step"
            )
            self.shown = -math.inf if not self.bar.disable else time.monotonic()
        due = time.monotonic() - self.shown >= (LINE if self.bar.disable else POSTFIX)
        if due:
            self.shown, figure = time.monotonic(), f"loss {float(loss):.3f}"
            if self.bar.disable:
                say(f"{self.head}step {done} of {total}  {figure}  {self.clock()}, {self.left(done, total)} left")
            else:
                self.bar.set_postfix_str(", ".join([figure, *self.figures]), refresh=False)
        if not self.bar.disable:
            self.bar.update(done - self.bar.n)

    def on_epoch(self, epoch: Epoch, top1: float | None = None) -> None:
        """Shows the figures of an epoch in the bar from now on; where there is none, prints a line."""
        self.figures = [] if top1 is None else [f"validation {percent(top1)}"]
        if (sharing := epoch.sharing) is not None:
            part = "" if sharing.fixed == 1 else f" of the {percent(sharing.fixed)} fixed"
            self.figures.append(f"{sharing.bits:.2f} bits/weight{part}")
            if sharing.changed is not None:
                self.figures.append(f"{percent(sharing.changed)} of indices changed")
            if sharing.size is not None:
                self.figures.append(f"{sharing.size:,} bytes at a price of {sharing.price:.2g}")
        if self.bar is not None and not self.bar.disable:
            self.shown = -math.inf
            return
        self.shown = time.monotonic()
        figures = "  ".join([f"loss {epoch.loss:.3f}", *self.figures])
        say(f"{self.head}epoch {epoch.number} of {epoch.epochs}  {figures}  {self.clock()}")

    def done(self, text: str) -> None:
        """Removes the bar, and prints the line of the step."""
        if self.bar is not None:
            self.bar.close()
        say(f"{self.head}{text}  {self.clock()}")

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


def percent(share: float) -> str:
    """Returns a share in per cent, to a tenth.

    >>> percent(0.98611), percent(math.nan)
    ('98.6 %', 'unknown')
    """
    return "unknown" if math.isnan(share) else f"{100 * share:.1f} %"


def accuracy_line(packed: Evaluation, dense: Evaluation | None, split: str, seed: int) -> str:
    """Returns a line with top-1 before and after, n, the 95 % interval, the images lost and gained, and the seed."""
    low, high = packed.interval
    before = f"dense {percent(dense.top1)} -> " if dense is not None else ""
    line = f"top-1 on {packed.n:,} {split} images  {before}packed file {percent(packed.top1)}"
    line += f"  95 % interval [{100 * low:.1f}, {100 * high:.1f}]"
    if dense is not None:
        lost, gained = flips(packed, dense)
        line += f"  {lost} {'image' if lost == 1 else 'images'} lost, {gained} gained"
    return f"{line}  seed {seed}"


def flips(packed: Evaluation, dense: Evaluation) -> tuple[int, int]:
    """Counts the images that only the dense model gets right, and those that only the packed one does."""
    return int((dense.correct & ~packed.correct).sum()), int((packed.correct & ~dense.correct).sum())
