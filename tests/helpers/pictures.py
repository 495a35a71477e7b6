"""Folders of small images, as a user has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["save_picture", "write_folder"]

CLASSES = ("ant", "bee", "cow")


def save_picture(path: Path, seed: int = 0, base: int = 0, size: tuple[int, int] = (40, 48)) -> None:
    """Writes an image of noise above a grey value; the ending of its name says in which format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = base + np.random.RandomState(seed).randint(0, 120, (*size, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def write_folder(folder: Path, counts: Mapping[str, int], classes: tuple[str, ...] = CLASSES) -> Path:
    """Writes so many PNG images of each class in each split; the classes overlap, and differ in brightness."""
    for split, count in counts.items():
        for number, name in enumerate(classes):
            for index in range(count):
                seed = index + 1000 * number + (100 if split == "train" else 0)
                save_picture(folder / split / name / f"{index}.png", seed, base=8 * number)
    return folder
