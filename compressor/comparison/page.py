"""The page: one HTML file with pictures, choices and tables, which needs nothing else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import compressor
from compressor.comparison.details import Details
from compressor.comparison.drawing import Picture
from compressor.comparison.front import Bounds, Choice, by_configuration, choices
from compressor.comparison.front_picture import front_picture
from compressor.comparison.points import Configuration, Point
from compressor.comparison.tables import (
    IMAGES,
    MOST_CLASSES,
    Table,
    table_of_classes,
    table_of_configurations,
    table_of_layers,
    table_of_runtimes,
    table_of_tensors,
)
from compressor.formats.errors import MissingError
from compressor.report.class_flips import ClassFlips
from compressor.report.size_text import size_text

__all__ = ["Comparison", "page"]

WIDE, NARROW = (14.5, 6.0), (5.0, 5.2)  # inches of 72 pixels
DIGITS = 3  # of a size beside a picture
PARTS = "indices", "codebooks", "untouched", "header", "checksums"


@dataclass(frozen=True)
class Comparison:
    """What a page shows.

    Args:
        configurations: all of them.
        details: of those files that are shown one by one, by the name of the point.
        bounds: of the user.
        hint: which files are shown one by one.
    """

    configurations: Sequence[Configuration]
    details: Sequence[tuple[Point, Details]]
    bounds: Bounds
    hint: str = ""

    @property
    def groups(self) -> dict[str, list[Configuration]]:
        """The configurations with a measured top-1, by the images that it was measured on."""
        groups: dict[str, list[Configuration]] = {}
        for one in self.configurations:
            if one.top1 is not None:
                groups.setdefault(one.best.data, []).append(one)
        return groups

    def pictures(self) -> dict[str, Picture]:
        """Returns all pictures, by names for files."""
        fronts = {
            f"front-{number}": front_picture(group, choices(group, self.bounds), self.bounds, data)
            for number, (data, group) in enumerate(self.groups.items(), 1)
        }
        of_files = {
            f"file-{number}-{place}": picture
            for number, (_, details) in enumerate(self.details, 1)
            for place, picture in enumerate(details.pictures(), 1)
        }
        return {**fronts, **of_files}


def page(comparison: Comparison) -> str:
    """Returns the page as HTML.

    Raises:
        MissingError: matplotlib or Jinja is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as exc:
        raise MissingError(f"a page needs Jinja ({exc}): pip install 'timm-compressor[report]'") from exc
    style, script, text = (_resource(f"page.{kind}") for kind in ("css", "js", "jinja"))
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(text)
    models = sorted({one.best.model for one in comparison.configurations})
    count = sum(len(one.points) for one in comparison.configurations)
    said = [] if len(comparison.groups) > 1 else [IMAGES, *(["model"] if len(models) == 1 else [])]  # in the headings
    return template.render(
        title=f"Compressed {', '.join(models[:3])}{' and others' if len(models) > 3 else ''}",
        introduction="A packed file of timm-compressor." if count == 1 else f"{count} packed files of timm-compressor.",
        groups=[_group(number, *group, comparison) for number, group in enumerate(comparison.groups.items())],
        table=table_of_configurations(comparison.configurations).without_empty_columns(said),
        files=[_file(number, point, details) for number, (point, details) in enumerate(comparison.details)],
        files_hint=comparison.hint, style=style, script=script, version=compressor.__version__,
        script_sha256=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )  # fmt: skip


def _resource(name: str) -> str:
    return (files("compressor.comparison") / name).read_text(encoding="utf-8")


def _group(number: int, data: str, ones: Sequence[Configuration], comparison: Comparison) -> Mapping[str, Any]:
    bounds = comparison.bounds
    chosen = choices(ones, bounds)
    wide, narrow = (front_picture(ones, chosen, bounds, data, size) for size in (WIDE, NARROW))
    several = any(len(one.points) > 1 for one in ones)
    seeds = " Each point is the mean over seeds." if several else ""
    return {
        "data": data,
        "heading": f"Accuracy against size: {data} ({ones[0].best.n:,} images)",
        "wide": wide.svg(f"w{number}"),
        "narrow": narrow.svg(f"n{number}"),
        "caption": f"Left and up is better. Points of the line are worth having; of a cross, another point is smaller "
        f"and at least as good.{seeds} Thin bars are 95 % intervals for {ones[0].best.n:,} images: differences within "
        f"them may be chance, all the more where the best of many is picked.",
        "choices": _cards(chosen),
        "bound": bounds != Bounds(),
    }


def _cards(chosen: Sequence[Choice]) -> list[Mapping[str, str]]:
    """Returns what is shown of the choices, those of one configuration together."""
    return [
        _card(
            ", ".join(one.title for one in same).capitalize(),
            "; ".join(one.reason for one in same),
            same[0].configuration,
        )
        for same in by_configuration(chosen)
    ]


def _card(title: str, reason: str, one: Configuration) -> Mapping[str, str]:
    point = one.best
    dense = "" if point.dense_top1 is None else f"dense {100 * point.dense_top1:.2f} %"
    spread = "" if one.deviation is None else f" ± {100 * one.deviation:.2f}"
    return {
        "title": title, "reason": reason, "bytes": size_text(one.bytes, DIGITS), "name": one.name,
        "ratio": f"{point.dense_bytes / one.bytes:.1f} times", "top1": f"{100 * (one.top1 or 0):.2f}{spread} %",
        "dense": dense, "command": point.command,
    }  # fmt: skip


def _file(number: int, point: Point, details: Details) -> Mapping[str, Any]:
    top1 = "" if point.top1 is None else f", top-1 {100 * point.top1:.2f} %"
    pictures = enumerate(details.pictures())
    return {
        "name": point.name, "line": f"{size_text(point.bytes, DIGITS)}{top1}", "command": point.command,
        "pictures": [{"title": one.title, "svg": one.svg(f"f{number}-{place}")} for place, one in pictures],
        "tables": list(_tables(point, details)),
    }  # fmt: skip


def _tables(point: Point, details: Details) -> Iterator[Mapping[str, str | Table]]:
    """Yields the tables of a file with their titles and what is said below them."""
    totals = details.report.totals
    parts = " + ".join(f"{name} {getattr(totals, name):,}" for name in PARTS)
    hint = f"{totals.file:,} bytes = {parts}; dense {totals.dense:,}. Entropy and coded in bits a weight."
    yield {"title": "Tensors", "table": table_of_tensors(details.report.rows), "hint": hint}
    if details.classes is not None:
        yield {
            "title": "Classes with other answers than before",
            "table": table_of_classes(details.classes),
            "hint": _said_of_classes(details.classes),
        }
    if details.runtimes:
        yield {
            "title": "Size for each runtime",
            "table": table_of_runtimes(details.runtimes, point.bytes, point.dense_bytes),
            "hint": "Each form was written with the default settings of 'compress export', and run or read back; where "
            "no file is written the size is an estimate, of the weights alone.",
        }
    for one in details.runtimes:
        if one.layers:
            yield {"title": f"Layers for {one.target}", "table": table_of_layers(one), "hint": one.what}


def _said_of_classes(classes: Sequence[ClassFlips]) -> str:
    if not classes:
        return "No image is answered otherwise: those that were right are right, those that were wrong are wrong."
    lost, gained = (sum(getattr(one, key) for one in classes) for key in ("lost", "gained"))
    more = f"The {MOST_CLASSES} of {len(classes)} classes with most of them. " if len(classes) > MOST_CLASSES else ""
    return (
        f"{more}Lost are images that the dense model gets right and the packed one does not, {lost:,} in all; "
        f"gained is the reverse, {gained:,} in all."
    )
