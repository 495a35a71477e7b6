"""Tables of configurations: cells for a page, and the same as Markdown, LaTeX and CSV."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from compressor.comparison.front import front
from compressor.comparison.points import Configuration
from compressor.report.class_flips import ClassFlips
from compressor.report.csv_text import csv_text
from compressor.report.runtime_size import RuntimeSize
from compressor.report.table import Row

__all__ = [
    "FORMATS",
    "IMAGES",
    "Cell",
    "Head",
    "Table",
    "TableRow",
    "escaped",
    "table_of_classes",
    "table_of_configurations",
    "table_of_layers",
    "table_of_runtimes",
    "table_of_tensors",
    "text_of",
]

FORMATS = "markdown", "latex", "csv"
MOST_CLASSES = 30  # that are shown of a file
IMAGES = "images of"  # the head of the column that says what top-1 was measured on


@dataclass(frozen=True)
class Head:
    """The head of a column: its text, whether there are numbers below, or sentences, which take several lines."""

    text: str
    numeric: bool = True
    is_prose: bool = False


@dataclass(frozen=True)
class Cell:
    """A cell: its text, and the number to sort by; None for a text."""

    text: str
    sort: float | None = None


@dataclass(frozen=True)
class TableRow:
    """A row, whether it is one of those worth having, and the command that makes its file."""

    cells: Sequence[Cell]
    on_front: bool = False
    command: str = ""


@dataclass(frozen=True)
class Table:
    """A table with heads."""

    heads: Sequence[Head]
    rows: Sequence[TableRow]

    def without_empty_columns(self, but: Sequence[str] = ()) -> Table:
        """Returns the table without the columns in which there is nothing, and without some others."""
        filled = (place for place in range(len(self.heads)) if any(row.cells[place].text for row in self.rows))
        kept = [place for place in filled if self.heads[place].text not in but]
        rows = [replace(row, cells=[row.cells[place] for place in kept]) for row in self.rows]
        return Table([self.heads[place] for place in kept], rows)


HEADS = [
    Head("configuration", False), Head("model", False), Head("files"), Head("bytes"), Head("smaller"),
    Head("top-1, %"), Head("deviation"), Head("95 % interval"), Head("dense, %"), Head("lost"), Head("gained"),
    Head(IMAGES, False),
]  # fmt: skip


def table_of_configurations(configurations: Sequence[Configuration]) -> Table:
    """Returns a row for each configuration, by ascending size; those of the front are marked, data set by data set."""
    by_data: dict[str, list[Configuration]] = {}
    for one in configurations:
        by_data.setdefault(one.best.data, []).append(one)
    kept = {id(one) for group in by_data.values() for one in front(group)}
    ordered = sorted(configurations, key=lambda one: one.bytes)
    return Table(HEADS, [TableRow(_cells(one), id(one) in kept, one.best.command) for one in ordered])


def _cells(one: Configuration) -> list[Cell]:
    point, interval = one.best, one.interval
    ratio = point.dense_bytes / one.bytes
    ends = "" if interval is None else " to ".join(f"{100 * end:.2f}" for end in interval)
    flips = [_mean([getattr(each, key) for each in one.points]) for key in ("lost", "gained")]
    return [
        Cell(one.name), Cell(point.model), Cell(str(len(one.points)), len(one.points)),
        Cell(f"{one.bytes:,.0f}", one.bytes), Cell(f"{ratio:.2f}x", ratio),
        _percent(one.top1), _percent(one.deviation), Cell(ends, _or(None if interval is None else interval[0])),
        _percent(point.dense_top1), *(Cell("" if count is None else f"{count:g}", _or(count)) for count in flips),
        Cell(point.data),
    ]  # fmt: skip


def _percent(share: float | None) -> Cell:
    return Cell("" if share is None else f"{100 * share:.2f}", _or(share))


def _or(number: float | None) -> float:
    """Returns a number to sort by: absent ones come first."""
    return -1.0 if number is None else number


def _mean(counts: Sequence[int | None]) -> float | None:
    known = [count for count in counts if count is not None]
    return sum(known) / len(known) if known else None


TENSOR_HEADS = [
    Head("tensor", False), Head("shape", False), Head("weights"), Head("scheme", False), Head("codewords"),
    Head("zeros, %"), Head("entropy"), Head("coded"), Head("codec", False), Head("indices"), Head("codebook"),
    Head("SQNR, dB"),
]  # fmt: skip


def table_of_tensors(rows: Sequence[Row]) -> Table:
    """Returns a row for each shared tensor of a file, largest first; entropy and coded in bits a weight."""
    ordered = sorted(rows, key=lambda row: -row.indices)
    return Table(TENSOR_HEADS, [TableRow(_tensor_cells(row)) for row in ordered])


def _tensor_cells(row: Row) -> list[Cell]:
    sqnr = math.inf if row.sqnr is None else row.sqnr
    return [
        Cell(row.site), Cell("x".join(map(str, row.shape))), Cell(f"{row.weights:,}", row.weights), Cell(row.scheme),
        Cell(f"{row.used:,}/{row.allowed:,}", row.used), Cell(f"{100 * row.zeros:.1f}", row.zeros),
        Cell(f"{row.entropy:.3f}", row.entropy), Cell(f"{row.coded:.3f}", row.coded), Cell(row.codec),
        Cell(f"{row.indices:,}", row.indices), Cell(f"{row.codebook:,}", row.codebook),
        Cell("exact" if row.sqnr is None else f"{row.sqnr:.1f}", min(sqnr, 1e9)),
    ]  # fmt: skip


CLASS_HEADS = [
    Head("class", False), Head("lost"), Head("gained"), Head("images"), Head("dense, %"), Head("packed, %"),
]  # fmt: skip


def table_of_classes(classes: Sequence[ClassFlips]) -> Table:
    """Returns a row for each class of which images have changed, those with most of them first."""
    ordered = sorted(classes, key=lambda one: -(one.lost + one.gained))
    return Table(CLASS_HEADS, [TableRow(_class_cells(one)) for one in ordered[:MOST_CLASSES]])


def _class_cells(one: ClassFlips) -> list[Cell]:
    shares = (_percent(count / max(one.images, 1)) for count in (one.dense, one.packed))
    counts = (Cell(f"{count:,}", count) for count in (one.lost, one.gained, one.images))
    return [Cell(one.name), *counts, *shares]


LAYER_HEADS = [Head("layer", False), Head("bytes before"), Head("coded"), Head("bits a weight")]
RUNTIME_HEADS = [Head("runtime", False), Head("bytes"), Head("of dense, %"), Head("what it is", False, True)]


def table_of_runtimes(runtimes: Sequence[RuntimeSize], packed: int, dense: int) -> Table:
    """Returns a row for each form of a file, smallest first, and last those that it could not be written in.

    Args:
        runtimes: forms for other runtimes.
        packed, dense: bytes of the packed file, and of the dense one.
    """
    ours = RuntimeSize("packed", "This file.", packed), RuntimeSize("dense", "A .safetensors file of floats.", dense)
    known = [(one.bytes, one) for one in (*ours, *runtimes) if one.bytes is not None]
    written = [
        [Cell(one.target), Cell(f"{size:,}", size), Cell(f"{100 * size / dense:.1f}", size), Cell(one.what)]
        for size, one in sorted(known, key=lambda entry: entry[0])
    ]
    others = [one for one in runtimes if one.bytes is None]
    missing = [[Cell(one.target), Cell("", math.inf), Cell("", math.inf), Cell(one.why_not)] for one in others]
    return Table(RUNTIME_HEADS, [TableRow(cells) for cells in (*written, *missing)])


def table_of_layers(runtime: RuntimeSize) -> Table:
    """Returns a row for each layer whose bytes a runtime's own coder was asked for."""
    return Table(
        LAYER_HEADS,
        [
            TableRow([Cell(name), Cell(f"{before:,}", before), Cell(f"{coded:,}", coded),
                      Cell(f"{8 * coded / max(before, 1):.2f}", coded / max(before, 1))])
            for name, before, coded in runtime.layers
        ],
    )  # fmt: skip


def text_of(table: Table, kind: str) -> str:
    """Returns a table as text.

    Args:
        table: of configurations.
        kind: one of ``FORMATS``; only CSV has plain numbers, and the commands.
    """
    if kind == "csv":
        heads = [*(head.text for head in table.heads), "worth having", "command"]
        rows = [[*map(_plain, row.cells), "yes" if row.on_front else "no", row.command] for row in table.rows]
        return csv_text([heads, *rows])
    from tabulate import tabulate

    shown = table.without_empty_columns()
    return tabulate(
        [[escaped(cell.text, kind) for cell in row.cells] for row in shown.rows],
        [escaped(head.text, kind) for head in shown.heads],
        tablefmt="github" if kind == "markdown" else "latex_raw",
        colalign=["right" if head.numeric else "left" for head in shown.heads], disable_numparse=True,
    ) + "\n"  # fmt: skip


def _plain(cell: Cell) -> str:
    """Returns the text of a cell; a number as programs read it."""
    return cell.text if cell.sort is None else cell.text.replace(",", "").removesuffix("x")


LATEX = {"\\": r"\textbackslash{}", **{one: f"\\{one}" for one in "&%$#_{}"}, "~": r"\textasciitilde{}"}
LATEX |= {"^": r"\textasciicircum{}"}


def escaped(text: str, kind: str) -> str:
    r"""Returns a text in which nothing is a command of the format.

    >>> escaped("a_b|<c>", "markdown"), escaped("a_b & 5%", "latex")
    ('a\\_b\\|&lt;c&gt;', 'a\\_b \\& 5\\%')
    """
    if kind == "latex":
        first = "{}" if text.lstrip().startswith(("[", "*")) else ""  # or it is an argument of the row's end before
        return first + "".join(LATEX.get(one, one) for one in text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{one}" if one in "\\`*_[]|" else one for one in text)
