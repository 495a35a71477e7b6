"""Writes the tables of the benchmarks into ``README.md`` beside them."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["put"]

PAGE = Path(__file__).parent / "README.md"


def put(name: str, table: str) -> None:
    """Replaces the text between the markers of this name in ``README.md`` by a table."""
    marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    PAGE.write_text(marked.sub(lambda m: m[1] + table + "\n" + m[2], PAGE.read_text()))
