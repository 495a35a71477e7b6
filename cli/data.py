"""What a data set holds, said before the long work; and ``compress check-data``, which says it alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compressor.cli.show import print_json, print_table, say
from compressor.cli.values import WholeNumber

if TYPE_CHECKING:
    from compressor.data.datasets import Dataset

__all__ = ["check_data", "look_at", "say_data", "say_images"]

HEAD = 19  # columns before the text of a line, as those of the steps of a run
_SHOWN = 20  # classes of a table


def say_images(preprocessing: Any) -> None:
    """Prints how images are prepared, in a line."""
    from compressor.data.preprocessing import describe_preprocessing

    say(f"{'images':{HEAD}}{describe_preprocessing(preprocessing)}", HEAD)


def say_data(data: Dataset, folder: Path | None) -> None:
    """Prints what a data set holds, in a line.

    Args:
        data: the data set.
        folder: of its files.
    """
    label = folder if folder is not None and data.name == "folder" else data.name
    say(f"{'data':{HEAD}}{label}: {data.summary}", HEAD)


def look_at(data: Dataset, folder: Path | None, whole: bool | None = None) -> None:
    """Prints what a data set holds, and opens all its images once, which shows as a bar.

    Args:
        data: the data set.
        folder: of its files.
        whole: see ``scan_images``.

    Raises:
        MissingError: more images than are allowed cannot be read.
    """
    import sys

    from tqdm import tqdm

    from compressor.data.scan import count_images, scan_images

    say_data(data, folder)
    with tqdm(
        total=count_images(data), desc="looking at images", disable=None, leave=False, file=sys.stderr, unit="image"
    ) as bar:
        scan_images(data, bar.update, whole)


@click.command("check-data")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--class-map", type=click.Path(path_type=Path), metavar="FILE",
              help="Text file with the name of a class a line, in their order.")  # fmt: skip
@click.option("--max-bad-images", metavar="N", type=WholeNumber(0), default=0, show_default=True,
              help="Images that may be unreadable; all are listed in bad_images.txt.")  # fmt: skip
@click.option("--all", "everything", is_flag=True, help="Show every class, not the first only.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead.")
def check_data(folder: Path, class_map: Path | None, max_bad_images: int, everything: bool, as_json: bool) -> None:
    """Look at the images in FOLDER/train/CLASS and FOLDER/val/CLASS: how many, of which classes, and which are bad.

    Every image is opened. The exit code is 4 where more cannot be read than may be, or where the splits do not fit.
    """
    from compressor.data.bad_images import BadImages
    from compressor.data.datasets import load_data

    data = load_data("", folder, bad=BadImages(max_bad_images, Path("bad_images.txt")), class_map=class_map)
    look_at(data, folder, whole=True)
    names = data.classes or tuple(map(str, range(data.num_classes)))
    counts = _counts(data)
    if as_json:
        rows = [{"name": name, **{split: count[number] for split, count in counts.items()}}
                for number, name in enumerate(names)]  # fmt: skip
        print_json({"folder": str(folder), "version": data.version, "classes": rows, "notes": data.notes})
        return
    shown = len(names) if everything else _SHOWN
    cells = [[name, *(f"{count[number]:,}" for count in counts.values())] for number, name in enumerate(names[:shown])]
    print_table([["class", *counts], *cells])
    if len(names) > shown:
        click.echo(f"and {len(names) - shown:,} more classes: --all shows them")


def _counts(data: Dataset) -> dict[str, list[int]]:
    """Returns the number of images of each class by split."""
    from collections import Counter

    splits: dict[str, Any] = {"train": data.train, "validation": data.validation, "test": data.test}
    counts = {
        name: Counter(label for _, label in split.source.samples) for name, split in splits.items() if split is not None
    }
    return {name: [count[number] for number in range(data.num_classes)] for name, count in counts.items()}
