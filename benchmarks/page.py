"""The page of figures beside the benchmarks: what each of them writes into it."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["put"]

PAGE = Path(__file__).parent / "README.md"


def put(name: str, table: str) -> None:
    """Put a table between the markers of that name."""
    marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    PAGE.write_text(marked.sub(lambda m: m[1] + table + "\n" + m[2], PAGE.read_text()))
