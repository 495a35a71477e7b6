"""One split of a data set: in memory, a whole batch at a time, or picture by picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from compressor.formats.errors import MissingError, UsageError
from compressor.random_state import seeded

__all__ = ["ArraySplit", "Batch", "ImageSplit", "PictureOrder", "preprocessing"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

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

    A picture that cannot be read is an error that names it: timm would put its neighbour in its place. An index may
    come with a seed, which all that is random about the picture then follows from, in whatever process it is opened.
    """

    def __init__(self, source: Any, transform: Callable[[Any], Tensor], mode: str) -> None:
        self.source, self.transform, self.mode = getattr(source, "reader", source), transform, mode

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, int]:
        if isinstance(index, tuple):
            with seeded(index[1]):
                return self[index[0]]
        from PIL import Image

        image, target = self.source[index][:2]
        try:
            with image if isinstance(image, Image.Image) else Image.open(image) as opened:
                converted = opened.convert(self.mode)
        except (OSError, ValueError, Image.DecompressionBombError) as exc:
            name = self.source.filename(index) if hasattr(self.source, "filename") else f"picture {index}"
            raise MissingError(f"{name}: not a readable picture ({type(exc).__name__}); repair or remove it") from exc
        finally:
            image.close()
        return self.transform(converted), int(target)


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


def preprocessing(config: Mapping[str, Any]) -> dict[str, Any]:
    """Choose what ``timm.data.create_transform`` needs of a model's configuration; raises UsageError for 2 channels.

    >>> preprocessing({"input_size": (1, 32, 32), "mean": (0.25, 0.5, 0.75), "std": (0.5, 0.5, 0.5)})
    {'mean': (0.5,), 'std': (0.5,), 'input_size': (1, 32, 32)}
    """
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    known: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "input_size": (3, 224, 224)}
    known |= {key: config[key] for key in keys if key in config}
    channels = known["input_size"][0]
    if channels not in (1, 3):
        raise UsageError(f"--in-chans {channels}: pictures are opened with 1 channel or with 3")
    for key in ("mean", "std"):  # of colours, for a model that takes grey: their mean
        values = tuple(known[key])
        known[key] = values if len(values) == channels else (sum(values) / len(values),) * channels
    return {**known, "input_size": tuple(known["input_size"])}
