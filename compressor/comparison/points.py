"""What is compared: a packed file with its size and accuracy, and the files that differ by their seeds alone."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from compressor.formats.errors import printable
from compressor.formats.file.reader import PackedFile
from compressor.formats.io.hub import PREFIX, pinned_name
from compressor.report.class_flips import ClassFlips
from compressor.report.interval import wilson_interval
from compressor.report.provenance import read_provenance
from compressor.report.report import dense_size
from compressor.sweep.ledger import Entry

__all__ = [
    "Configuration",
    "Point",
    "configurations",
    "point_of_entry",
    "point_of_file",
    "recipe_command",
    "told_apart",
]

SEED = "seed"
SHORTENED = 32  # digits of a commit's 40 that are not shown


@dataclass(frozen=True)
class Point:
    """One packed file.

    Args:
        name: shown for it.
        model: timm's name.
        bytes, dense_bytes: sizes of the file, and of the dense one.
        data: what top-1 was measured on, in words; "" where it was not.
        n: number of those images.
        top1, dense_top1: shares of them, 0 to 1; None where it was not measured.
        command: that makes the file.
        options: by which the rows of a sweep differ; empty for a file alone.
        path: of the file; None where it is there no more.
        summary: a CSV file with figures of each epoch; None where there is none.
        lost, gained: images that only the dense model, or only the packed one, gets right.
        classes: of which there are such images; None where that is not known.
        source: the folder of the sweep that the row is of, or of the file alone.
    """

    name: str
    model: str
    bytes: int
    dense_bytes: int
    data: str = ""
    n: int = 0
    top1: float | None = None
    dense_top1: float | None = None
    command: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None
    summary: Path | None = None
    lost: int | None = None
    gained: int | None = None
    classes: tuple[ClassFlips, ...] | None = None
    source: Path = Path()


@dataclass(frozen=True)
class Configuration:
    """The files that differ by their seeds alone, in the order of these; figures are means over them.

    Args:
        name: shown for it.
        points: at least one, all of the same data and the same model.
    """

    name: str
    points: tuple[Point, ...]

    @property
    def best(self) -> Point:
        """The file that stands for all: that of the first seed."""
        return self.points[0]

    @property
    def bytes(self) -> float:
        """The mean size."""
        return fmean(point.bytes for point in self.points)

    @property
    def top1(self) -> float | None:
        """The mean top-1; None where one was not measured."""
        measured = [point.top1 for point in self.points if point.top1 is not None]
        return fmean(measured) if len(measured) == len(self.points) else None

    @property
    def deviation(self) -> float | None:
        """The standard deviation of top-1 over the seeds; None for a single one."""
        measured = [point.top1 for point in self.points if point.top1 is not None]
        return stdev(measured) if len(measured) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of top-1, of the mean as if it were one model's; None where it was not measured."""
        return None if self.top1 is None else wilson_interval(self.top1, self.best.n)


def configurations(points: Iterable[Point]) -> list[Configuration]:
    """Puts the files of a sweep together that differ by their seeds alone, in the order of the first of each."""
    groups: dict[Any, list[Point]] = {}
    for number, point in enumerate(points):
        options = tuple((key, str(value)) for key, value in point.options.items() if key != SEED)
        key = (point.source, point.data, point.model, options) if point.options else number
        groups.setdefault(key, []).append(point)
    return [Configuration(_name(group), tuple(sorted(group, key=_seed))) for group in groups.values()]


def _seed(point: Point) -> float:
    """Returns the seed of a row, which may have ended before those of lower seeds; 0 for what is no number."""
    seed = point.options.get(SEED)
    return seed if isinstance(seed, int | float) else 0


def _name(group: list[Point]) -> str:
    """Returns the common name of files: without the seed, where there are several."""
    first = group[0]
    return first.name.removesuffix(f"-{SEED}{first.options.get(SEED)}") if len(group) > 1 else first.name


def told_apart(points: Sequence[Point]) -> list[Point]:
    """Puts its folder before the name of each row of several sweeps, and of each file whose name another one has."""
    sweeps = {point.source for point in points if point.options}
    names = Counter(point.name for point in points if not point.options)

    def is_clear(point: Point) -> bool:
        return len(sweeps) < 2 if point.options else names[point.name] < 2

    return [one if is_clear(one) else replace(one, name=printable(str(one.source / one.name))) for one in points]


def point_of_file(path: Path, file: PackedFile, command: str | None = None, name: str | None = None) -> Point:
    """Returns a packed file as a point.

    Args:
        path: of the file.
        file: opened.
        command: that made it; None: one that runs its recipe again is made up.
        name: shown for it; None: that of the file, or of its repository on the hub.

    Raises:
        FormatError: its provenance is not of the form that this program writes.
    """
    provenance = read_provenance(file)
    data, top1, pinned = provenance.data, provenance.top1, pinned_name(path)
    own = path.name.removesuffix(".safetensors") if pinned is None else pinned[:-SHORTENED].removeprefix(PREFIX)
    model = printable(str((file.model or {}).get("name", "a module")))
    return Point(
        name=printable(own if name is None else name),
        model=model,
        bytes=file.source.size,
        dense_bytes=dense_size(file),
        data="" if data is None or top1 is None else f"{data.name or 'images of your own'}, {data.split}",
        n=0 if data is None or top1 is None else data.n,
        top1=None if top1 is None or data is None else top1.packed,
        dense_top1=None if top1 is None or data is None else top1.dense,
        command=recipe_command(pinned or str(path), file) if command is None else command,
        source=path.parent,
        path=path,
        summary=_beside(path),
    )


def point_of_entry(entry: Entry, path: Path, data: str) -> Point:
    """Returns a row of a sweep as a point.

    Args:
        entry: of the row.
        path: of its file, in a folder of the sweep's.
        data: what top-1 was measured on, in words.
    """
    one = entry.outcome
    return Point(
        name=printable(entry.row), model=printable(one.model), bytes=one.bytes, dense_bytes=one.dense_bytes,
        data=data if one.top1 is not None else "", n=one.n, top1=one.top1, dense_top1=one.dense_top1,
        command=printable(entry.command), source=path.parent.parent, options=entry.options,
        path=path if path.is_file() else None, summary=_beside(path), lost=one.lost, gained=one.gained,
        classes=one.classes,
    )  # fmt: skip


def _beside(path: Path) -> Path | None:
    """Returns the figures of the epochs that a run has left beside its file."""
    summary = path.with_name(f"{path.name.removesuffix('.rejected')}.summary.csv")
    return summary if summary.is_file() else None


def recipe_command(source: str, file: PackedFile) -> str:
    """Returns a command that runs the recipe of a file again; "" where it has none.

    Args:
        source: by which the command names the file.
        file: opened.
    """
    if not file.recipe or not file.model:
        return ""
    provenance = read_provenance(file)
    data = "" if provenance.data is None else provenance.data.name
    images = ["--dataset", data] if data else ["--data-dir", "IMAGES"] if provenance.data else ["--pretrained"]
    words = ["compress", file.model["name"], *images, "--recipe", source, "--seed", str(provenance.seed)]
    return printable(shlex.join(words))
