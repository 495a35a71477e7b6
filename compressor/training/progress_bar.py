"""A training that can be watched: a bar on a terminal or in a notebook, and a line for each epoch.

This module does not import torch, so that the command's help is quick.
"""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressor.training.loop import Epoch

__all__ = ["ProgressBar", "epoch_figures", "make_bar", "percent"]

BAR = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"  # fits 80 columns
POSTFIX = 1.0  # seconds between two readings of the loss, which on a GPU makes it wait


def percent(share: float) -> str:
    """Returns a share in per cent, to a tenth.

    >>> percent(0.98611), percent(math.nan)
    ('98.6 %', 'unknown')
    """
    return "unknown" if math.isnan(share) else f"{100 * share:.1f} %"


def epoch_figures(epoch: Epoch, top1: float | None) -> str:
    """Returns the figures of an epoch as text: loss, accuracy, and how far the sharing has come.

    Args:
        epoch: the epoch.
        top1: on the validation images, 0 to 1; None where there are none.
    """
    figures = [f"epoch {epoch.number} of {epoch.epochs}", f"loss {epoch.loss:.3f}"]
    figures += [] if top1 is None else [f"validation {percent(top1)}"]
    if (sharing := epoch.sharing) is not None:
        part = "" if sharing.fixed == 1 else f" of the {percent(sharing.fixed)} fixed"
        figures.append(f"{sharing.bits:.2f} bits/weight{part}")
        if sharing.changed is not None:
            figures.append(f"{percent(sharing.changed)} of indices changed")
        if sharing.size is not None:
            figures.append(f"{sharing.size:,} bytes at a price of {sharing.price:.2g}")
    return "  ".join(figures)


def make_bar(head: str, total: int, done: int = 0, shown: bool | None = None) -> Any:
    """Returns a bar of tqdm's on stderr, which fits the terminal.

    Args:
        head: what stands before it.
        total: steps.
        done: steps that were taken before.
        shown: whether it is shown; None: on a terminal, and in a notebook.
    """
    from tqdm import tqdm

    if shown is None:
        shown = sys.stderr.isatty() or "ipykernel" in sys.modules
    return tqdm(
        total=total, initial=done, desc=head, disable=not shown, leave=False, file=sys.stderr, dynamic_ncols=True,
        bar_format=BAR,
    )  # fmt: skip


class ProgressBar:
    """Shows a fine-tuning from Python: a bar, and above it a line for each epoch.

    Args:
        shown: whether it is shown; None: on a terminal, and in a notebook.
    """

    def __init__(self, shown: bool | None) -> None:
        self.shown = shown
        self.bar: Any = None
        self._last = -math.inf

    def on_step(self, done: int, total: int, loss: Any) -> None:
        """Moves the bar on.

        Args:
            done, total: optimiser steps.
            loss: mean of the epoch so far, a scalar tensor; it is read once a second.
        """
        if self.bar is None:
            self.bar = make_bar("fine-tuning ", total, done - 1, self.shown)
        if self.bar.disable:
            return
        if time.monotonic() - self._last >= POSTFIX:
            self._last = time.monotonic()
            self.bar.set_postfix_str(f"loss {float(loss):.3f}", refresh=False)
        self.bar.update(done - self.bar.n)

    def on_epoch(self, epoch: Epoch, top1: float | None) -> None:
        """Prints the figures of an epoch."""
        if self.bar is not None and not self.bar.disable:
            self.bar.write(epoch_figures(epoch, top1), file=sys.stderr)

    def close(self) -> None:
        """Removes the bar; the lines of the epochs stay."""
        if self.bar is not None:
            self.bar.close()
