"""What of a folder of images takes no part: files of other formats, and classes without an image."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from compressor.wording import counted

__all__ = ["folder_notes", "listed"]

_SHOWN = 5  # kinds of files, and classes, that a line names


def folder_notes(readers: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns a phrase for each way in which files or classes of some splits take no part.

    Args:
        readers: timm's readers of the splits, by their names. Readers of other data than folders leave out nothing
            that can be seen here.
    """
    notes: list[str] = []
    for split, reader in readers.items():
        root, classes = getattr(reader, "root", None), getattr(reader, "class_to_idx", None)
        if hasattr(reader, "samples") and classes and root is not None and Path(root).is_dir():
            notes += _notes(split, Path(root), Counter(number for _, number in reader.samples), classes)
    return tuple(notes)


def _notes(split: str, root: Path, images: Mapping[int, int], classes: Mapping[str, int]) -> Iterator[str]:
    """Yields the phrases of one split.

    Args:
        split: its name.
        root: its folder.
        images: the number of its images by the number of their class.
        classes: the numbers of the classes by their names.
    """
    from timm.data import get_img_extensions

    readable = get_img_extensions(as_set=True)  # type: ignore[no-untyped-call]
    others, unmapped, empty = Counter[str](), Counter[str](), {name for name in classes if not images[classes[name]]}
    for place, subfolders, files in os.walk(root, followlinks=True):
        kinds = Counter(os.path.splitext(file)[1].lower() for file in files if not file.startswith("."))
        found = sum(count for kind, count in kinds.items() if kind in readable)
        others += Counter({kind: count for kind, count in kinds.items() if kind not in readable})
        label = "" if Path(place) == root else os.path.basename(place)
        if label not in classes and found:
            unmapped[label] += found
        elif label and label not in classes and not subfolders:
            empty.add(label)
    if others:
        shown = listed(f"{count:,} {kind or 'without an ending'}" for kind, count in others.most_common())
        yield f"left out of {split}: {shown} (only {', '.join(sorted(readable))} are read)"
    if unmapped:
        total, names = sum(unmapped.values()), listed(sorted(unmapped))
        yield f"left out of {split}: {counted(total, 'image')} of classes that are not in the class map: {names}"
    if empty:
        yield f"no image in {split} of {listed(sorted(empty))}"
    if stray := images[classes[""]] if "" in classes else 0:
        yield f"{counted(stray, 'image')} of {split} outside the folders of classes: taken for a class without a name"


def listed(words: Iterable[str]) -> str:
    """Returns the first of some words, and how many more there are.

    >>> listed("abcdefg")
    'a, b, c, d, e and 2 more'
    """
    shown = [word if word.isprintable() else ascii(word)[1:-1] for word in words]
    more = f" and {len(shown) - _SHOWN:,} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more
