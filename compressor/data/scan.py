"""A look at all images of a data set before the long work, so that those that cannot be read are known at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from compressor.data.datasets import Dataset
from compressor.data.splits import ImageSplit
from compressor.distributed.collectives import main_process_first

__all__ = ["MOST_WHOLE", "count_images", "scan_images"]

MOST_WHOLE = 20_000
"""Of more images than these only the headers are read: to decode all would take as long as an epoch of training."""


def count_images(data: Dataset) -> int:
    """Returns the number of images that are files, and may be damaged; 0 for data held in memory."""
    return sum(map(len, _splits(data)))


def scan_images(data: Dataset, on_image: Callable[[], object] = lambda: None, whole: bool | None = None) -> None:
    """Opens every image of a data set, and records those that cannot be read.

    Args:
        data: the data set; where there are several processes, all call this, and the first opens the images.
        on_image: is called after each image.
        whole: whether images are decoded; None: where there are at most ``MOST_WHOLE``. Else only their headers are
            read, and what is damaged further on is found when it is trained on.

    Raises:
        MissingError: more of them than are allowed cannot be read; the message names them.
    """
    splits = _splits(data)
    decode = count_images(data) <= MOST_WHOLE if whole is None else whole

    def look() -> None:
        with ThreadPoolExecutor(max(1, data.workers)) as threads:
            for split in splits:
                for _ in threads.map(lambda index, split=split: split.probe(index, decode), range(len(split))):
                    on_image()

    main_process_first(look)
    if splits:
        splits[0].bad.all_splits.check()


def _splits(data: Dataset) -> list[ImageSplit]:
    return [split for split in (data.train, data.validation, data.test) if isinstance(split, ImageSplit)]
