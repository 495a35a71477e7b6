"""Runs of a benchmark in slices: rows are appended as they are measured, and those that are there are left out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

__all__ = ["measure_missing", "rows_of"]


def rows_of(results: Path) -> list[dict[str, Any]]:
    """Returns the rows that have been measured."""
    return [json.loads(line) for line in results.read_text().splitlines()]


def measure_missing(
    runs: Iterable[Any], results: Path, minutes: float, measure: Callable[[Any], dict[str, Any] | None]
) -> None:
    """Measures the runs that have no row, until the time is up, and appends the rows.

    Args:
        runs: dataclasses, whose fields are in the rows.
        results: a JSON line for each row.
        minutes: after which no further run is begun.
        measure: returns what a row holds beside the fields of its run; None: no row.
    """
    end = time.perf_counter() + 60 * minutes
    results.touch()
    for run in runs:
        fields = asdict(run)
        if any({**row, **fields} == row for row in rows_of(results)):  # another process may append as well
            continue
        if time.perf_counter() > end:
            print("time is up: call again for the rest")
            break
        if (measured := measure(run)) is None:
            continue
        row = {**fields, **measured}
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)
