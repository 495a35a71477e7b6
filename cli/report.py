"""``compress report FILE... | SWEEP``: a page, or a table, of several packed files beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compressor.cli.click_options import byte_size
from compressor.cli.files import PackedPath, memory_option
from compressor.cli.show import json_text, say
from compressor.cli.values import Word
from compressor.formats.errors import ResourceError, UsageError
from compressor.formats.io.atomic import check_not_input, check_writable, make_folder, write_atomically
from compressor.wording import counted

if TYPE_CHECKING:
    from compressor.cli.report_files import Wanted
    from compressor.comparison.front import Bounds
    from compressor.comparison.page import Comparison

__all__ = ["report"]


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
@click.option(
    "--measured", type=click.Path(path_type=Path), multiple=True, metavar="FILE.json",
    help="What eval --against --per-class, or sensitivity, has printed with --json; may be repeated.",
)  # fmt: skip
@click.option("--runtimes", is_flag=True, help="Export each file to all runtimes and show the sizes: seconds for each.")
@click.option("--png", "folder", type=click.Path(path_type=Path, file_okay=False), help="Folder for the pictures, too.")
@click.option("--force", is_flag=True, help="Replace files that exist.")
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
@memory_option
def report(
    sources: tuple[Path, ...],
    output: Path | None,
    bounds: tuple[str, ...],
    kind: str | None,
    measured: tuple[Path, ...],
    runtimes: bool,
    folder: Path | None,
    force: bool,
    as_json: bool,
    max_memory: int | None,
) -> None:
    """Show packed FILEs, or those of a SWEEP, beside each other: accuracy against size, and what is in each file."""
    from compressor.cli.report_files import compared

    limits = _bounds(bounds)
    kind = _format(kind, as_json)
    target = Path("report.html") if output is None and kind == "html" else output
    if target is not None:
        check_not_input(target, *sources, *measured)
        check_writable(target, force)
    if folder is not None and not folder.parent.is_dir():
        raise ResourceError(f"folder {folder.parent} does not exist: make it first")
    wanted = _wanted(measured, runtimes, max_memory, "" if folder else kind)
    comparison = compared(sources, limits, max_memory, wanted)
    pictures = {} if folder is None else _pictures(comparison, folder, force)
    text = _text(comparison, kind)
    if folder is not None:  # all that may fail has been done
        make_folder(folder)
    if target is None:
        click.echo(text, nl=False)
    else:
        write_atomically(target, text.encode(), force=force)
        say(f"{target}  {counted(len(comparison.configurations), 'configuration')}, {len(text.encode()):,} bytes")
    for path, content in pictures.items():
        write_atomically(path, content, force=force)
    if folder is not None:
        say(f"{folder}  {counted(len(pictures), 'picture')}")


def _format(kind: str | None, as_json: bool) -> str:
    """Returns what ``--format`` and ``--json`` ask for together."""
    if as_json and kind not in (None, "json"):
        raise UsageError(f"--json and --format {kind}: name one")
    return "json" if as_json else kind or "html"


def _wanted(measured: Sequence[Path], runtimes: bool, max_memory: int | None, kind: str) -> Wanted | None:
    """Returns what is shown of files one by one; None where a table alone is asked for, by its ``kind``."""
    from compressor.cli.report_files import Wanted
    from compressor.comparison.measured import read_measured

    if kind in ("", "html"):
        return Wanted(read_measured(measured), runtimes, max_memory)
    if flag := "--measured" if measured else "--runtimes" if runtimes else "":
        raise UsageError(f"{flag} is for the page: leave it out with --format {kind}")
    return None


def _bounds(texts: Sequence[str]) -> Bounds:
    from compressor.comparison.front import Bounds

    found: dict[str, Any] = {}
    for text in texts:
        key = "top1" if text.strip().endswith("%") else "size"
        if key in found:
            raise UsageError(f"--bound {text}: there is one of that kind already")
        try:
            found[key] = byte_size(text) if key == "size" else _share(text)
        except (click.BadParameter, ValueError):
            raise UsageError(f"--bound {text}: expected a size, as 450KB, or a top-1, as 92%") from None
    return Bounds(**found)


def _share(text: str) -> float:
    """Returns a top-1 in per cent as a share; raises ValueError for what is none."""
    percent = float(text.strip().removesuffix("%"))
    if not 0 <= percent <= 100:
        raise ValueError(text)
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
