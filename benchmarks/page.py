"""Writes the tables of the benchmarks into pages: ``README.md`` beside them, or another."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["put"]

PAGE = Path(__file__).parent / "README.md"


def put(name: str, table: str, page: Path = PAGE) -> None:
    """Replaces the text between the markers of this name in a page by a table."""
    marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    page.write_text(marked.sub(lambda m: m[1] + table + "\n" + m[2], page.read_text()))
