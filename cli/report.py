"""``compress report FILE... | SWEEP``: a page, or a table, of several packed files beside each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compressor.cli.click_options import byte_size
from compressor.cli.files import PackedPath, make_folder, memory_option, open_packed
from compressor.cli.show import json_text, say
from compressor.cli.sweep import DENSE
from compressor.cli.values import Word
from compressor.formats.errors import CompressorError, MissingError, ResourceError, UsageError
from compressor.formats.io.atomic import check_not_input, check_writable, write_atomically
from compressor.wording import counted

if TYPE_CHECKING:
    from compressor.comparison.details import Details
    from compressor.comparison.front import Bounds
    from compressor.comparison.page import Comparison
    from compressor.comparison.points import Point

__all__ = ["report"]

MOST_DETAILS = 12  # files of a sweep that are shown one by one


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="FILE...|SWEEP", type=PackedPath(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="File to write. [default: report.html, or stdout]"
)
@click.option(
    "--bound",
    "bounds",
    multiple=True,
    metavar="SIZE|PERCENT%",
    help="The most bytes, as 450KB, or the least top-1, as 92%; drawn, and kept to by the choices.",
)
@click.option(
    "--format", "kind", type=Word(["html", "markdown", "latex", "csv", "json"]),
    help="A page, or all configurations as a table or JSON. [default: html]",
)  # fmt: skip
@click.option("--png", "folder", type=click.Path(path_type=Path, file_okay=False), help="Folder for the pictures, too.")
@click.option("--force", is_flag=True, help="Replace files that exist.")
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
@memory_option
def report(
    sources: tuple[Path, ...],
    output: Path | None,
    bounds: tuple[str, ...],
    kind: str | None,
    folder: Path | None,
    force: bool,
    as_json: bool,
    max_memory: int | None,
) -> None:
    """Show packed FILEs, or those of a SWEEP, beside each other: accuracy against size, and what is in each file."""
    limits = _bounds(bounds)
    if as_json and kind not in (None, "json"):
        raise UsageError(f"--json and --format {kind}: name one")
    kind = "json" if as_json else kind or "html"
    target = Path("report.html") if output is None and kind == "html" else output
    if target is not None:
        check_not_input(target, *sources)
        check_writable(target, force)
    if folder is not None and not folder.parent.is_dir():
        raise ResourceError(f"folder {folder.parent} does not exist: make it first")
    comparison = _comparison(sources, limits, max_memory, with_details=kind == "html" or folder is not None)
    pictures = {} if folder is None else _pictures(comparison, folder, force)
    text = _text(comparison, kind)
    if folder is not None:  # all that may fail has been done
        make_folder(folder)
    if target is None:
        click.echo(text, nl=False)
    else:
        write_atomically(target, text.encode(), force=force)
        say(f"{target}  {counted(len(comparison.configurations), 'configuration')}, {len(text.encode()):,} bytes")
    if folder is not None:
        for path, content in pictures.items():
            write_atomically(path, content, force=force)
        say(f"{folder}  {counted(len(pictures), 'picture')}")


def _bounds(texts: Sequence[str]) -> Bounds:
    from compressor.comparison.front import Bounds

    found: dict[str, Any] = {}
    for text in texts:
        key = "top1" if text.strip().endswith("%") else "size"
        if key in found:
            raise UsageError(f"--bound {text}: there is one of that kind already")
        found[key] = byte_size(text) if key == "size" else _share(text)
    return Bounds(**found)


def _share(text: str) -> float:
    try:
        percent = float(text.strip().removesuffix("%"))
    except ValueError:
        percent = -1.0
    if not 0 <= percent <= 100:
        raise UsageError(f"--bound {text}: expected a size, as 450KB, or a top-1, as 92%")
    return percent / 100


def _text(comparison: Comparison, kind: str) -> str:
    from compressor.comparison.document import document
    from compressor.comparison.page import page
    from compressor.comparison.tables import table_of_configurations, text_of

    if kind == "html":
        return page(comparison)
    if kind == "json":
        return f"{json_text(document(comparison))}\n"
    return text_of(table_of_configurations(comparison.configurations), kind)


def _pictures(comparison: Comparison, folder: Path, force: bool) -> dict[Path, bytes]:
    """Draws the pictures that are to be in a folder, after a look whether they can be written there."""
    pictures = {folder / f"{name}.png": picture for name, picture in comparison.pictures().items()}
    for path in pictures if folder.exists() else ():
        check_writable(path, force)
    return {path: picture.png() for path, picture in pictures.items()}


def _comparison(sources: Sequence[Path], bounds: Bounds, max_memory: int | None, with_details: bool) -> Comparison:
    from compressor.comparison.front import front
    from compressor.comparison.page import Comparison
    from compressor.comparison.points import configurations, told_apart

    points = told_apart([point for source in dict.fromkeys(sources) for point in _points(source, max_memory)])
    alone = [point for point in points if not point.options]
    found = configurations(points)
    if not with_details:
        return Comparison(found, [], bounds)
    groups = Comparison(found, [], bounds).groups.values()
    rows = [one.best for group in groups for one in front(group) if one.best.options] if groups else []
    left = [point for point in points if point.options and not groups]
    shown = [point for point in [*alone, *rows[:MOST_DETAILS], *left[:MOST_DETAILS]] if point.path is not None]
    hint = "The files that were named, and those of the front." if rows and alone else ""
    hint = hint or ("Of each configuration of the front, the file of its first seed." if rows else "")
    details = [(point, _details(point, max_memory)) for point in shown]
    return Comparison(found, details, bounds, hint)


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


def _details(point: Point, max_memory: int | None) -> Details:
    from compressor.comparison.details import Details

    assert point.path is not None
    with open_packed(point.path, max_memory) as file:
        return Details.of(file, point.summary, _dense(point))


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
