"""What is in one packed file, as pictures: bytes, weights and codewords, bits, and how training went."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compressor.comparison.drawing import BLUE, GREY, ORANGE, TEAL, Picture
from compressor.comparison.measured import TensorLoss
from compressor.formats.file.entries import shown
from compressor.formats.file.reader import PackedFile
from compressor.report.class_flips import ClassFlips
from compressor.report.report import Report
from compressor.report.runtime_size import RuntimeSize
from compressor.report.table import Row
from compressor.report.weight_stats import Values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Details", "Histogram"]

WIDTH = 5.8  # inches
MOST_TENSORS, MOST_HISTOGRAMS = 16, 3
BINS, MOST_MARKS = 80, 5
LEAST_SPAN = 0.01  # of a value, above and below the middle of a curve
LONGEST = 30  # characters of a tensor's name
COLORS = BLUE, ORANGE, TEAL, GREY  # of prices


@dataclass(frozen=True, eq=False)
class Histogram:
    """The weights of a tensor.

    Args:
        name: of the tensor.
        values, shares: its codewords, and the share of the weights that have each.
        dense: the weights before, float32[n]; None where they are not known.
    """

    name: str
    values: NDArray[np.float32]
    shares: NDArray[np.float64]
    dense: NDArray[np.float32] | None


@dataclass(frozen=True, eq=False)
class Details:
    """The figures of one file.

    Args:
        report: of the file.
        histograms: of its largest tensors.
        epochs: figures of each epoch, by timm's columns; empty where there are none.
        losses: what the model loses where one of its tensors alone is rounded; empty where that was not measured.
        classes: of which other images are right than before; None where that is not known.
        runtimes: sizes in the forms of other runtimes; empty where it was not exported.
    """

    report: Report
    histograms: Sequence[Histogram]
    epochs: Sequence[Mapping[str, float]]
    losses: Sequence[TensorLoss] = ()
    classes: Sequence[ClassFlips] | None = None
    runtimes: Sequence[RuntimeSize] = ()

    @classmethod
    def of(
        cls, file: PackedFile, summary: Path | None, dense: Mapping[str, NDArray[Any]] | None, **measured: Any
    ) -> Details:
        """Reads a file.

        Args:
            file: opened.
            summary: figures of its epochs; None: there are none.
            dense: the dense weights by name; None: they are not known.
            measured: losses, classes and runtimes, where they are known.
        """
        report = Report.of(file)
        filled = (row for row in report.rows if row.weights)
        largest = sorted(filled, key=lambda row: -row.weights)[:MOST_HISTOGRAMS]
        sites = {shown(name): name for name in file.sites}
        histograms = [_histogram(file, sites[row.site], dense or {}) for row in largest if row.site in sites]
        return cls(report, histograms, [] if summary is None else _epochs(summary), **measured)

    def pictures(self) -> Iterator[Picture]:
        """Yields the pictures, those that there are figures for."""
        rows = sorted(self.report.rows, key=lambda row: -row.indices)[:MOST_TENSORS]
        if rows:
            yield self._bytes(rows)
            yield _bits(rows)
        if self.histograms:
            yield _weights(self.histograms)
        if self.epochs:
            yield _training(self.epochs)
        if measured := [row for row in rows if row.site in {one.site for one in self.losses}]:
            yield _sensitivity(measured, self.losses)

    def _bytes(self, rows: Sequence[Row]) -> Picture:
        totals = self.report.totals
        others = [row for row in self.report.rows if row not in rows]

        def draw(figure: Figure, axes: list[Axes]) -> None:
            (axis,) = axes
            names = [*(_short(row.site) for row in rows), *([f"{len(others)} other tensors"] if others else [])]
            parts = {
                "indices": ([row.indices for row in rows], sum(row.indices for row in others), BLUE),
                "codebook": ([row.codebook for row in rows], sum(row.codebook for row in others), ORANGE),
                "in the header": ([row.overhead for row in rows], sum(row.overhead for row in others), GREY),
            }
            left = np.zeros(len(names) + 1)
            for label, (sizes, more, color) in parts.items():
                widths = np.array([*sizes, *([more] if others else []), 0])
                axis.barh(range(len(left)), widths, left=left, color=color, label=label)
                left += widths
            axis.barh([len(names)], [totals.untouched], color=TEAL, label="not shared")
            axis.set_yticks(range(len(left)), [*names, "norms, biases, rest"])
            axis.set(xlabel="bytes of the file")
            axis.invert_yaxis()
            axis.xaxis.set_major_formatter("{x:,.0f}")
            axis.xaxis.set_major_locator(_few_marks(3))  # numbers of many digits
            figure.legend(loc="outside upper left", ncols=4, handlelength=1, columnspacing=1)

        return Picture("bytes of the file by tensor and part", draw, (WIDTH, 1.4 + 0.27 * (len(rows) + 2)))


def _bits(rows: Sequence[Row]) -> Picture:
    def draw(figure: Figure, axes: list[Axes]) -> None:
        (axis,) = axes
        places = range(len(rows))
        axis.hlines(places, [row.entropy for row in rows], [row.coded for row in rows], color=GREY, lw=2)
        axis.plot([row.entropy for row in rows], places, "o", color=ORANGE, ms=6, label="entropy")
        axis.plot([row.coded for row in rows], places, "|", color=BLUE, ms=12, mew=2.5, label="coded in the file")
        axis.set_yticks(places, [_short(row.site) for row in rows])
        axis.set(xlabel="bits a weight")
        axis.set_xlim(left=0)
        axis.invert_yaxis()
        figure.legend(loc="outside upper left", ncols=2, handlelength=1)

    return Picture("entropy against coded bits", draw, (WIDTH, 1.4 + 0.27 * (len(rows) + 2)))


def _weights(histograms: Sequence[Histogram]) -> Picture:
    def draw(figure: Figure, axes: list[Axes]) -> None:
        for axis, one in zip(axes, histograms, strict=True):
            if one.dense is not None:
                shares, edges = np.histogram(one.dense, BINS)
                axis.stairs(shares / max(one.dense.size, 1), edges, fill=True, color=GREY, alpha=0.5)
            axis.vlines(one.values, 0, one.shares, color=BLUE, lw=1)
            axis.plot(one.values, one.shares, "o", color=BLUE, ms=4)
            axis.set_title(_short(one.name), fontsize=12, loc="left")
            axis.set(yscale="log", ylabel="% of weights")
            axis.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}")
            axis.yaxis.set_minor_formatter(lambda *_: "")
            axis.tick_params(labelbottom=True)
        axes[-1].set(xlabel="value of a weight")

    return Picture(
        "weights and codewords of the largest tensors", draw, (WIDTH, 2.0 * len(histograms)), len(histograms)
    )


def _training(epochs: Sequence[Mapping[str, float]]) -> Picture:
    curves = [(key, label) for key, label in LABELS.items() if any(key in epoch for epoch in epochs)]

    def draw(figure: Figure, axes: list[Axes]) -> None:
        for axis, (key, label) in zip(axes, curves, strict=True):
            places = [epoch["epoch"] + 1 for epoch in epochs if key in epoch]
            values = [epoch[key] for epoch in epochs if key in epoch]
            axis.plot(places, values, "o-", color=BLUE, ms=4)
            axis.set_ylim(*_span(values))
            axis.set_title(label, fontsize=12, loc="left")
            axis.xaxis.set_major_locator(_few_marks(integer=True))
            axis.set_xlim(0.5, epochs[-1]["epoch"] + 1.5)
        axes[-1].set(xlabel="epoch")

    return Picture("training", draw, (WIDTH, 0.5 + 1.8 * len(curves)), len(curves))


def _sensitivity(rows: Sequence[Row], losses: Sequence[TensorLoss]) -> Picture:
    """Draws the loss at each price, a color for each; a tensor that loses nothing has no point."""
    from matplotlib.ticker import LogLocator, NullFormatter

    prices = sorted({one.rate for one in losses})

    def draw(figure: Figure, axes: list[Axes]) -> None:
        (axis,) = axes
        places = {row.site: place for place, row in enumerate(rows)}
        for price, color in zip(prices, itertools.cycle(COLORS)):
            found = {one.site: one.measured for one in losses if one.rate == price and one.measured > 0}
            seen = [row.site for row in rows if row.site in found]
            label = f"price {price:.0e}"
            axis.plot([found[site] for site in seen], [places[site] for site in seen], "o", color=color, label=label)
        axis.set_yticks(range(len(rows)), [_short(row.site) for row in rows])
        axis.set(xscale="log", xlabel="divergence, nats an image")
        axis.xaxis.set_major_locator(LogLocator(numticks=MOST_MARKS))
        axis.xaxis.set_major_formatter("{x:g}")  # its own are of letters that are not read here
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.invert_yaxis()
        figure.legend(loc="outside upper left", ncols=3, handlelength=1, columnspacing=1)

    title = "sensitivity: each tensor alone rounded at a price of a bit"
    return Picture(title, draw, (WIDTH, 1.4 + 0.27 * (len(rows) + 2)))


LABELS = {
    "train_loss": "loss in training",
    "eval_top1": "top-1 on validation images, %",
    "train_bits_per_weight": "bits a weight",
}


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Returns the ends of a scale on which values that hardly differ look so.

    >>> [round(end, 3) for end in _span([1.0, 1.0001])], _span([0.0, 10.0])
    ([0.99, 1.01], (-1.0, 11.0))
    """
    middle, most = (max(values) + min(values)) / 2, max(values) - min(values)
    half = max(0.6 * most, LEAST_SPAN * abs(middle)) or 1.0
    return middle - half, middle + half


def _few_marks(most: int = 5, integer: bool = False) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, integer=integer)


def _histogram(file: PackedFile, name: str, dense: Mapping[str, NDArray[Any]]) -> Histogram:
    tensor = file.shared(name)
    book = file.book(tensor.book)
    found = Values.of(name, tensor, book, np.bincount(tensor.indices, minlength=book.shape[1]))
    before = dense.get(name)
    weights = None if before is None or before.size != found.counts.sum() else before.astype(np.float32).reshape(-1)
    return Histogram(shown(name), found.values, found.counts / found.counts.sum(), weights)


def _epochs(summary: Path) -> list[dict[str, float]]:
    """Reads the figures of epochs; an unreadable file has none, and an unreadable figure is left out."""
    try:
        with summary.open(newline="", encoding="utf-8") as file:
            rows = [{key: _number(text) for key, text in row.items()} for row in csv.DictReader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error):
        return []
    figures = [{str(key): value for key, value in row.items() if value is not None} for row in rows]
    return [one for one in figures if "epoch" in one and any(key in one for key in LABELS)]


def _number(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if np.isfinite(value) else None


def _short(name: str) -> str:
    """Returns a name with its middle left out, where it is long.

    >>> _short("conv1.weight"), _short("stages.0.blocks.12.token_mixer.mixer.conv.weight")
    ('conv1.weight', 'stages.0.block…xer.conv.weight')
    """
    half = (LONGEST - 1) // 2
    return name if len(name) <= LONGEST else f"{name[:half]}…{name[-half - 1 :]}"
