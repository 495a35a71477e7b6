"""Rows as CSV, of which a spreadsheet takes no text for a formula."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from compressor.formats.errors import printable

__all__ = ["csv_text"]

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # begin what spreadsheets compute, and may send elsewhere


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    r"""Returns rows as CSV; text that a spreadsheet would compute has an apostrophe before it, as OWASP advises.

    >>> csv_text([["name", "drop"], ["=HYPERLINK(A1)", -0.5]])
    "name,drop\n'=HYPERLINK(A1),-0.5\n"
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([*map(_safe, row)] for row in rows)
    return text.getvalue()


def _safe(cell: Any) -> Any:
    if not isinstance(cell, str):
        return cell
    text = printable(cell)  # a carriage return would begin a cell of its own
    return f"'{text}" if cell.startswith(FORMULA) else text
