"""Tables of shared tensors, as text of limited width and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from textwrap import fill

from tabulate import tabulate

__all__ = ["Row", "html_table", "legend_of", "markdown_table", "text_table"]


@dataclass(frozen=True)
class Row:
    """One shared tensor. Sizes in bytes; entropy and coded in bits per weight; SQNR in dB, None if it is exact.

    The entropy is that of how often codewords occur; a codec that makes use of places may take less.
    """

    site: str
    shape: tuple[int, ...]
    weights: int
    scheme: str
    bits: int
    used: int
    allowed: int
    zeros: float
    entropy: float
    codec: str
    coded: float
    indices: int
    codebook: int
    overhead: int
    ratio: float
    sqnr: float | None
    rule: str


COLUMNS: dict[str, Callable[[Row], str]] = {
    "site": lambda r: r.site,
    "shape": lambda r: "x".join(map(str, r.shape)),
    "weights": lambda r: f"{r.weights:,}",
    "scheme": lambda r: r.scheme,
    "bits": lambda r: str(r.bits),
    "codewords": lambda r: f"{r.used}/{r.allowed}",
    "zeros": lambda r: f"{100 * r.zeros:.1f} %",
    "entropy": lambda r: f"{r.entropy:.3f}",
    "codec": lambda r: r.codec,
    "coded": lambda r: f"{r.coded:.3f}",
    "indices": lambda r: f"{r.indices:,}",
    "codebook": lambda r: f"{r.codebook:,}",
    "overhead": lambda r: f"{r.overhead:,}",
    "ratio": lambda r: f"{r.ratio:.2f}x",
    "SQNR": lambda r: "exact" if r.sqnr is None else f"{r.sqnr:.1f} dB",
    "rule": lambda r: r.rule,
}
DROPPED_FIRST = ("codec", "scheme", "rule", "overhead", "codebook", "bits", "zeros", "shape", "codewords", "weights")
LEGEND = {
    ("site",): ": a tensor whose weights share values",
    ("entropy", "coded"): " in bits a weight",
    ("indices", "codebook", "overhead"): " in bytes",
    ("codewords",): ": shared values, used and allowed",
    ("SQNR",): ": squares of the weights over squares of their errors, at 0 dB as large",
}
"""What follows the names of some columns in a legend."""
LEAST_SITE = 16  # columns of a name
LEFT_ALIGNED = ("site", "shape", "scheme", "codec", "rule")


def text_table(rows: Sequence[Row], width: int) -> tuple[str, list[str]]:
    """Returns rows as plain text, and its columns, of which the least important are dropped until it fits ``width``.

    Args:
        rows: the rows.
        width: the most characters of a line.
    """
    columns = list(COLUMNS)
    for column in (None, *DROPPED_FIRST):
        columns = [name for name in columns if name != column]
        text = _table(rows, columns, "plain")
        if max(map(len, text.splitlines())) <= width:
            break
    else:  # of names as long as these only parts fit on a line
        excess = max(map(len, text.splitlines())) - width
        text = _table(rows, columns, "plain", max(max(len(row.site) for row in rows) - excess, LEAST_SITE))
    return text, columns


def legend_of(columns: Sequence[str]) -> list[str]:
    """Returns what some columns of a table are, and their units, those that need no explanation left out.

    Example:
        >>> legend_of(["site", "shape", "indices", "SQNR"])[:2]
        ['site: a tensor whose weights share values', 'indices in bytes']
    """
    legend = []
    for explained, text in LEGEND.items():
        if there := [name for name in explained if name in columns]:
            *first, last = there
            legend.append(f"{', '.join(first)} and {last}{text}" if first else f"{last}{text}")
    return legend


def markdown_table(rows: Sequence[Row]) -> str:
    """Returns rows as a Markdown table with all columns."""
    return _table(rows, list(COLUMNS), "pipe")


def html_table(rows: Sequence[Row]) -> str:
    """Returns rows as an HTML table with all columns, in which special characters are escaped."""
    return _table(rows, list(COLUMNS), "html")


def _table(rows: Sequence[Row], columns: Sequence[str], form: str, site_width: int | None = None) -> str:
    align = ["left" if column in LEFT_ALIGNED else "right" for column in columns]
    cells = [[COLUMNS[column](row) for column in columns] for row in rows]
    if site_width is not None:
        cells = [[fill(site, site_width), *others] for site, *others in cells]
    if form == "plain":  # the headers are an ordinary row, because tabulate pads real headers by two
        return tabulate([columns, *cells], tablefmt=form, colalign=align, disable_numparse=True)
    return tabulate(cells, columns, form, colalign=align if cells else None, disable_numparse=True)
