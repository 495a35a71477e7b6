"""docs/exit-codes.md: its table has exactly the codes that errors and signals give."""

from __future__ import annotations

import re
from pathlib import Path

from compressor.formats import errors

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "exit-codes.md").read_text(encoding="utf-8")


def test_exit_codes_are_those_of_the_errors() -> None:
    rows = re.findall(r"^\| ([\d, ]+) \|", PAGE, re.MULTILINE)
    stated = {int(code) for row in rows for code in row.split(",")}
    raised = {getattr(errors, name).exit_code for name in errors.__all__ if name.endswith("Error")}
    assert stated == raised | {0, 129, 130, 143}
