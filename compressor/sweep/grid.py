"""The rows of a sweep: every combination of the values of its options."""

from __future__ import annotations

import itertools
import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compressor.formats.errors import UsageError

__all__ = ["Row", "rows_of"]

LONGEST = 100  # bytes of the name of a row, which is that of files
SPEAKING = ("scheme", "recipe")  # options whose values say what they are


@dataclass(frozen=True)
class Row:
    """One run of a sweep.

    Args:
        name: of its files, unique in the sweep.
        options: value of each option by which rows differ, by the name of the option.
    """

    name: str
    options: Mapping[str, Any]


def rows_of(grids: Iterable[Mapping[str, Sequence[Any]]]) -> list[Row]:
    """Returns a row for every combination of values, grid by grid; the first option changes slowest.

    Args:
        grids: values by option, for each grid.

    Raises:
        UsageError: two rows are the same.

    Example:
        >>> [row.name for row in rows_of([{"scheme": ["learnt", "kmeans"], "bits": [2]}, {"delta": [0.01]}])]
        ['learnt-bits2', 'kmeans-bits2', 'delta0.01']
    """
    combinations = [
        dict(zip(grid, values, strict=True)) for grid in grids for values in itertools.product(*grid.values())
    ]
    rows: dict[str, Row] = {}
    for options in combinations:
        row = Row(_name(options), options)
        if rows.setdefault(row.name, row) is not row:
            raise UsageError(f"two rows are {row.name}: leave out one")
    return list(rows.values())


def _name(options: Mapping[str, Any]) -> str:
    """Returns a name that is one of files, too.

    A checksum tells it from others where characters had to go, or where a value has the mark that stands between
    options: the recipe ``a-bits2`` is not the recipe ``a`` with 2 bits.
    """
    parts = [f"{'' if key in SPEAKING else key.replace('_', '-')}{value}" for key, value in options.items()]
    name = "-".join(parts) or "run"
    plain = re.sub(r"[^\w.+-]", "_", name).encode()[:LONGEST].decode(errors="ignore").lstrip(".-")
    if plain == name and not any(isinstance(value, str) and "-" in value for value in options.values()):
        return name
    return f"{plain}-{zlib.crc32(json.dumps(options, default=str).encode()):08x}"
