"""What figures of sizes have in common: axes in bytes, and a note in the picture of what it was drawn from."""

from __future__ import annotations

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["NOTE", "digest", "new_figure", "save_figure", "size_axis"]

NOTE = "Description"  # keyword of the PNG's text with the digest of the points


def digest(points: Any) -> str:
    """Returns a digest of the points that are drawn, by which a test sees whether a picture is up to date.

    >>> digest([("a", 1)]) == digest([("a", 1)]), digest([("a", 1)]) == digest([("a", 2)])
    (True, False)
    """
    return hashlib.sha256(json.dumps(points).encode()).hexdigest()[:16]


def new_figure(rows: int, columns: int) -> tuple[Any, Any] | None:
    """Returns a figure and its panels, a list of rows, or None where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        print("no matplotlib: the figure is not drawn (pip install '.[report]')")
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def size_axis(axis: Any) -> None:
    """Gives a logarithmic axis marks in KB and MB."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(
        FuncFormatter(lambda size, _: f"{size / 1e6:g} MB" if size >= 1e6 else f"{size / 1e3:g} KB")
    )
    axis.set_minor_formatter(NullFormatter())


def save_figure(figure: Any, path: Path, points: Any) -> None:
    """Writes a figure with the digest of its points in it."""
    figure.savefig(path, dpi=110, metadata={NOTE: digest(points), "Software": None})
