"""The splits of a data set: images held in memory, read a batch at a time, or images opened one by one."""

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

__all__ = [
    "UNREADABLE",
    "ArraySplit",
    "Batch",
    "ImageSplit",
    "SeededRandomSampler",
    "check_readable",
    "collate_readable",
]

UNREADABLE = -(1 << 40)
"""The class of an image that could not be read, and of no other."""

Batch = tuple[Tensor, Tensor]


class ArraySplit(Dataset[Any]):
    """Images held in memory; a whole batch is normalised, padded and augmented at once.

    Random numbers come from torch's global generator.

    Args:
        images: uint8 in 0..255 or float32 in 0..1, [n, C, H, W].
        labels: int64[n].
        mean: subtracted from every pixel after scaling to 0..1.
        std: divides every pixel after that.
        pad: pixels of ``fill`` added on each side after normalising.
        fill: the normalised value of the border.
        shift: each image moves by up to this many pixels along both axes.
        flip: whether half of the images are mirrored, left to right.
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
        """Returns the batch of the images and labels at the given indices."""
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
    """Crops each image at a random place of its border; [n, C, H + 2s, W + 2s] -> [n, C, H, W]."""
    count, _, height, width = images.shape
    top, left = torch.randint(0, 2 * shift + 1, (2, count))
    rows = top[:, None] + torch.arange(height - 2 * shift)
    columns = left[:, None] + torch.arange(width - 2 * shift)
    image = torch.arange(count)[:, None, None]
    cropped = images[image, :, rows[:, :, None], columns[:, None, :]]
    return cropped.permute(0, 3, 1, 2).contiguous()


class ImageSplit(Dataset[Any]):
    """Images opened one by one from a data set that timm created.

    An image that cannot be read is recorded and returned as zeros of the class ``UNREADABLE``, to be left out of the
    batch; timm would replace it by its neighbour. An index may come with a seed, from which all randomness of the image
    then follows, whichever process opens it.

    Args:
        source: timm's data set, or its reader.
        transform: turns a Pillow image into a tensor.
        mode: the Pillow mode that images are converted to, "RGB" or "L".
        size: (C, H, W) of the tensors that ``transform`` returns.
        bad: the record of unreadable images.
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
            image, target = self._open(index)
        except UnreadableError:
            self.bad.add(index)
            return torch.zeros(self.size), UNREADABLE
        return self.transform(image), int(target)

    def probe(self, index: int, whole: bool) -> None:
        """Records the image at ``index`` if it cannot be read.

        Args:
            index: its position.
            whole: whether it is decoded, as small as its format allows; else its header alone is read.
        """

        def decoded(image: Any) -> Any:
            if whole:
                image.draft(None, (1, 1))  # a JPEG is decoded at an eighth of its size, all of its bytes
                image.load()

        try:
            self._open(index, decoded)
        except UnreadableError:
            self.bad.add(index)

    def _open(self, index: int, read: Callable[[Any], Any] | None = None) -> tuple[Any, Any]:
        """Opens an image; returns what ``read`` makes of it, by default the image in the right mode, and the label."""
        from PIL import Image, UnidentifiedImageError

        try:
            image, target = self.source[index][:2]
            with image, image if isinstance(image, Image.Image) else Image.open(image) as opened:
                return (opened.convert(self.mode) if read is None else read(opened)), target
        except UnidentifiedImageError as exc:
            raise UnreadableError("no image of a format that is known here") from exc
        except OSError as exc:
            if exc.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):  # not a fault of the image
                raise ResourceError(f"image {index} of the {self.bad.name} split: {exc.strerror}") from exc
            raise UnreadableError(f"{type(exc).__name__}: {exc}") from exc
        except Exception as exc:  # on damaged files Pillow raises anything, from SyntaxError to struct.error
            raise UnreadableError(f"{type(exc).__name__}: {exc}") from exc

    def _why_unreadable(self, index: int) -> str:
        name = self.source.filename(index) if hasattr(self.source, "filename") else f"image {index}"
        try:
            self._open(index)
        except UnreadableError as exc:
            return " ".join(f"{name} {exc}".split())
        return f"{name} could be read when tried again"


class UnreadableError(Exception):
    """An image cannot be read; the message gives the reason."""


def collate_readable(items: Sequence[tuple[Tensor, int]]) -> Batch:
    """Collates the images that could be read into a batch.

    Args:
        items: pairs of an image, float32[C, H, W], and its label, which is ``UNREADABLE`` for one to leave out.

    Returns:
        Images, float32[n, C, H, W], and labels, int64[n].

    Raises:
        MissingError: none of the images could be read.
    """
    readable = [item for item in items if item[1] != UNREADABLE]
    if not readable:
        raise MissingError(f"none of the {len(items)} images of a batch can be read; is the data set damaged?")
    images, labels = default_collate(readable)
    return images, labels


def check_readable(loader: Any) -> None:
    """Raises MissingError if a loader's data set has more unreadable images than allowed; see ``BadImages.check``."""
    split = getattr(loader, "dataset", None)
    if isinstance(split, ImageSplit):
        split.bad.all_splits.check()


class SeededRandomSampler(Sampler[tuple[int, int]]):
    """Samples each image once an epoch, in random order, together with a seed for its augmentation.

    Args:
        images: the split to sample from.
        generator: draws order and seeds.
    """

    def __init__(self, images: ImageSplit, generator: torch.Generator) -> None:
        self.images, self.generator = images, generator

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.randperm(len(self.images), generator=self.generator)
        seeds = torch.randint(1 << 32, (len(order),), generator=self.generator)
        yield from zip(order.tolist(), seeds.tolist(), strict=True)

    def __len__(self) -> int:
        return len(self.images)
