"""One split of a data set: in memory, a whole batch at a time, or picture by picture."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate

from compressor.data.bad_images import BadSplit
from compressor.formats.errors import MissingError, ResourceError
from compressor.rng import seeded

__all__ = ["UNREADABLE", "ArraySplit", "Batch", "ImageSplit", "PictureOrder", "check_pictures", "readable"]

UNREADABLE = -(1 << 40)
"""The class of a picture that could not be read, and of nothing else."""

Batch = tuple[Tensor, Tensor]


class ArraySplit(Dataset[Any]):
    """Images held in memory; a whole batch is normalised, padded and augmented at once.

    Args:
        images: uint8 in 0..255 or float32 in 0..1, [n, C, H, W].
        labels: int64[n].
        mean, std: per image value, after scaling to 0..1.
        pad: pixels of ``fill`` added on each side, after normalising.
        fill: the normalised value of the border.
        shift: each image moves by up to this many pixels along both axes.
        flip: whether half of the images are mirrored, left to right.

    Random numbers come from torch's global generator.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        mean: float,
        std: float,
        pad: int = 0,
        fill: float = 0.0,
        shift: int = 0,
        flip: bool = False,
    ) -> None:
        self.images, self.labels = images, labels
        self.mean, self.std, self.pad, self.fill = mean, std, pad, fill
        self.shift, self.flip = shift, flip

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Give the batch of these images and labels."""
        chosen = torch.as_tensor(indices)
        images = self.images[chosen]
        if images.dtype == torch.uint8:
            images = images.float() / 255
        images = F.pad((images - self.mean) / self.std, [self.pad + self.shift] * 4, value=self.fill)
        if self.flip:
            mirrored = torch.rand(len(chosen)) < 0.5
            images[mirrored] = images[mirrored].flip(-1)
        return (_shifted(images, self.shift) if self.shift else images), self.labels[chosen]


def _shifted(images: Tensor, shift: int) -> Tensor:
    """Cut each image out of its border at a random place; [n, C, H + 2s, W + 2s] -> [n, C, H, W]."""
    count, _, high, wide = images.shape
    top, left = torch.randint(0, 2 * shift + 1, (2, count))
    rows = top[:, None] + torch.arange(high - 2 * shift)
    columns = left[:, None] + torch.arange(wide - 2 * shift)
    picture = torch.arange(count)[:, None, None]
    cut = images[picture, :, rows[:, :, None], columns[:, None, :]]
    return cut.permute(0, 3, 1, 2).contiguous()


class ImageSplit(Dataset[Any]):
    """Pictures opened one by one from a data set that timm made.

    One that cannot be read is noted, and given as zeros of the class ``UNREADABLE``, for others to leave out: timm
    would put its neighbour in its place. An index may come with a seed, which all that is random about the picture
    then follows from, in whatever process it is opened.

    Args:
        source: the data set, or its reader.
        transform: of a picture of Pillow's.
        mode: that pictures are brought to, "RGB" or "L".
        size: (C, H, W) that ``transform`` gives.
        bad: where those are noted that cannot be read.
    """

    def __init__(
        self, source: Any, transform: Callable[[Any], Tensor], mode: str, size: tuple[int, ...], bad: BadSplit
    ) -> None:
        self.source, self.transform, self.mode = getattr(source, "reader", source), transform, mode
        self.size, self.bad = size, bad
        bad.explain = self._why_unreadable

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, int]:
        if isinstance(index, tuple):
            with seeded(index[1]):
                return self[index[0]]
        try:
            picture, target = self._open(index)
        except UnreadableError:
            self.bad.add(index)
            return torch.zeros(self.size), UNREADABLE
        return self.transform(picture), int(target)

    def _open(self, index: int) -> tuple[Any, Any]:
        from PIL import Image

        try:
            image, target = self.source[index][:2]
            with image, image if isinstance(image, Image.Image) else Image.open(image) as opened:
                return opened.convert(self.mode), target
        except OSError as exc:
            if exc.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):  # not the picture's fault
                raise ResourceError(f"picture {index} of the {self.bad.name} split: {exc.strerror}") from exc
            raise UnreadableError(f"{type(exc).__name__}: {exc}") from exc
        except Exception as exc:  # Pillow's readers raise anything, from SyntaxError to struct.error, on damaged files
            raise UnreadableError(f"{type(exc).__name__}: {exc}") from exc

    def _why_unreadable(self, index: int) -> str:
        name = self.source.filename(index) if hasattr(self.source, "filename") else f"picture {index}"
        try:
            self._open(index)
        except UnreadableError as exc:
            return " ".join(f"{name} {exc}".split())
        return f"{name} could be read when tried again"


class UnreadableError(Exception):
    """A picture cannot be read; its message says why."""


def readable(pictures: Sequence[tuple[Tensor, int]]) -> Batch:
    """Make a batch of those pictures that could be read; raises MissingError where none could."""
    kept = [picture for picture in pictures if picture[1] != UNREADABLE]
    if not kept:
        raise MissingError(f"none of the {len(pictures)} pictures of a batch can be read; is the data set damaged?")
    images, labels = default_collate(kept)
    return images, labels


def check_pictures(loader: Any) -> None:
    """Raise MissingError where a loader, or others of its data set, met more unreadable pictures than there may be."""
    split = getattr(loader, "dataset", None)
    if isinstance(split, ImageSplit):
        split.bad.all_splits.check()


class PictureOrder(Sampler[tuple[int, int]]):
    """Each picture once an epoch, in random order, with a seed for what is random about it."""

    def __init__(self, pictures: ImageSplit, generator: torch.Generator) -> None:
        self.pictures, self.generator = pictures, generator

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.randperm(len(self.pictures), generator=self.generator)
        seeds = torch.randint(1 << 32, (len(order),), generator=self.generator)
        yield from zip(order.tolist(), seeds.tolist(), strict=True)

    def __len__(self) -> int:
        return len(self.pictures)
