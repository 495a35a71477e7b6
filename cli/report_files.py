"""The files of ``compress report``: packed ones and those of sweeps, and what is known of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.cli.files import in_bytes, open_packed
from compressor.cli.show import say
from compressor.cli.sweep import DENSE
from compressor.formats.errors import CompressorError, MissingError, UsageError

if TYPE_CHECKING:
    from compressor.comparison.details import Details
    from compressor.comparison.front import Bounds
    from compressor.comparison.measured import Measured
    from compressor.comparison.page import Comparison
    from compressor.comparison.points import Point
    from compressor.report.runtime_size import RuntimeSize

__all__ = ["Wanted", "compared"]

MOST_DETAILS = 12  # files of a sweep that are shown one by one


@dataclass(frozen=True)
class Wanted:
    """What is shown of files one by one.

    Args:
        measured: what other commands have measured of them.
        with_runtimes: whether each is exported to each target.
        max_memory: GiB that tensors may decode to; None: as many as are believable.
    """

    measured: Measured
    with_runtimes: bool
    max_memory: int | None


def compared(sources: Sequence[Path], bounds: Bounds, max_memory: int | None, wanted: Wanted | None) -> Comparison:
    """Reads packed files and sweeps.

    Args:
        sources: packed files, and folders of sweeps.
        bounds: of the user.
        max_memory: GiB that tensors may decode to; None: as many as are believable.
        wanted: of the files one by one; None: the table of all configurations is enough.
    """
    from compressor.comparison.front import front
    from compressor.comparison.page import Comparison
    from compressor.comparison.points import configurations, told_apart

    points = told_apart([point for source in dict.fromkeys(sources) for point in _points(source, max_memory)])
    alone = [point for point in points if not point.options]
    found = configurations(points)
    if wanted is None:
        return Comparison(found, [], bounds)
    groups = Comparison(found, [], bounds).groups.values()
    rows = [one.best for group in groups for one in front(group) if one.best.options] if groups else []
    left = [point for point in points if point.options and not groups]
    shown = [point for point in [*alone, *rows[:MOST_DETAILS], *left[:MOST_DETAILS]] if point.path is not None]
    hint = "The files that were named, and those of the front." if rows and alone else ""
    hint = hint or ("Of each configuration of the front, the file of its first seed." if rows else "")
    return Comparison(found, list(zip(shown, _all_details(shown, wanted), strict=True)), bounds, hint)


def _points(source: Path, max_memory: int | None) -> Iterator[Point]:
    """Yields a packed file, or all of a sweep."""
    from compressor.comparison.points import point_of_entry, point_of_file
    from compressor.sweep.ledger import Ledger

    if not source.is_dir():
        with open_packed(source, max_memory) as file:
            yield point_of_file(source, file, _command_of_zoo(source))
        return
    ledger = Ledger(source)
    entries = ledger.entries()
    if not entries:
        raise MissingError(f"{source}: no rows of a sweep in this folder: expected {ledger.path}, of 'compress sweep'")
    data = ""
    for entry in entries:
        path = ledger.file_of(entry)
        if not data and path.is_file():
            with open_packed(path, max_memory) as file:
                data = point_of_file(path, file).data
    for entry in entries:
        yield point_of_entry(entry, ledger.file_of(entry), data or "images of the sweep")


def _command_of_zoo(path: Path) -> str | None:
    """Returns the command that wrote a file that comes with the package; None for other files."""
    from compressor.model_zoo import checkpoint, list_checkpoints
    from compressor.model_zoo.index import INDEX

    is_shipped = path.parent == INDEX.parent / "checkpoints" and path.stem in list_checkpoints()
    return checkpoint(path.stem).command if is_shipped else None


def _all_details(shown: Sequence[Point], wanted: Wanted) -> list[Details]:
    """Returns the figures of files, those of ``--measured`` among them; raises UsageError where it has others."""
    measured, models = wanted.measured, {point.model for point in shown}
    if strange := [model for model in measured.losses if model not in models]:
        known = ", ".join(sorted(models)) or "none"
        raise UsageError(
            f"--measured {measured.paths[strange[0]]}: of the model {strange[0]}; those of the files shown: {known}"
        )
    contents = [_content(point, wanted) if measured.classes else "" for point in shown]
    if strange := [content for content in measured.classes if content not in contents]:
        raise UsageError(
            f"--measured {measured.paths[strange[0]]}: of a packed file that is not shown one by one; name it as FILE"
        )
    return [_details(point, content, wanted) for point, content in zip(shown, contents, strict=True)]


def _content(point: Point, wanted: Wanted) -> str:
    assert point.path is not None
    with open_packed(point.path, wanted.max_memory) as file:
        return file.content_sha256()


def _details(point: Point, content: str, wanted: Wanted) -> Details:
    from compressor.comparison.details import Details

    assert point.path is not None
    with open_packed(point.path, wanted.max_memory) as file:
        return Details.of(
            file, point.summary, _dense(point),
            losses=wanted.measured.losses.get(point.model, ()),
            classes=wanted.measured.classes.get(content, point.classes),
            runtimes=_runtimes(point.path, wanted) if wanted.with_runtimes else (),
        )  # fmt: skip


def _runtimes(path: Path, wanted: Wanted) -> list[RuntimeSize]:
    from compressor.deployment.sizes import runtime_sizes

    return list(runtime_sizes(path, in_bytes(wanted.max_memory), lambda name: say(f"{path.name}  export to {name}")))


def _dense(point: Point) -> dict[str, Any] | None:
    """Returns the dense weights that a row of a sweep has started from, where they are kept."""
    assert point.path is not None
    path = point.path.parent.parent / DENSE
    if not point.options or not path.is_file():
        return None
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, TypeError) as exc:
        raise CompressorError(f"{path}: {exc}") from exc
