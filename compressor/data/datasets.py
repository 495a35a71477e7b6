"""Image data sets: the built-in digits, the files of Fashion-MNIST, and all that timm can open.

``load_data`` returns a ``Dataset`` with preprocessing, splits and loaders of batches (images float32[n, C, H, W],
labels int64[n]).
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, default_collate
from torch.utils.data import Dataset as TorchDataset

from compressor.data.bad_images import BadImages
from compressor.data.built_in import BUILT_IN, check_name
from compressor.data.images import open_images
from compressor.data.splits import ArraySplit, Batch, ImageSplit, SeededRandomSampler, collate_readable
from compressor.formats.errors import MissingError, UsageError
from compressor.wording import counted

__all__ = ["FASHION_MNIST_DIR", "Dataset", "load_data"]

FASHION_MNIST_DIR = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""


@dataclass(frozen=True)
class Dataset:
    """A data set ready for training and evaluation.

    Args:
        name: as given on the command line.
        version: changes whenever splits, preprocessing or augmentation do; part of cache keys.
        input_size: (C, H, W) of one image.
        mean: of the normalisation, one value per channel.
        std: of the normalisation, one value per channel.
        num_classes: number of labels.
        train: the training split.
        validation: the split for choices made during training.
        test: the split for final figures; None if the data has none.
        workers: number of processes that open images; 0 for data held in memory.
        channels_last: whether batches use the channels-last memory format, in which GPUs are faster in half precision.
        classes: the names of the labels in their order; empty where they are only numbered.
        resizing: how images of any size become those of ``input_size``: ``interpolation``, ``crop_pct`` and
            ``crop_mode`` of ``timm.data.create_transform``; empty where all images have that size.
        notes: a phrase for each way in which files or classes take no part.
    """

    name: str
    version: str
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    train: TorchDataset[Any]
    validation: TorchDataset[Any]
    test: TorchDataset[Any] | None
    workers: int = 0
    channels_last: bool = False
    classes: tuple[str, ...] = ()
    resizing: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How images are prepared, by the names of timm's ``pretrained_cfg``."""
        return {"input_size": self.input_size, "mean": self.mean, "std": self.std, **self.resizing}

    @property
    def summary(self) -> str:
        """The data set in a line: images, splits, classes, and what takes no part.

        >>> load_data("digits").summary
        '1,078 train, 359 validation, 360 test images of 10 classes'
        """
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        counts = [f"{len(split):,} {name}" for name, split in splits.items() if split is not None]  # type: ignore[arg-type]
        return "; ".join(
            [f"{', '.join(counts)} images of {counted(self.num_classes, 'class', 'classes')}", *self.notes]
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the labels; their numbers where they have none."""
        return self.classes or tuple(map(str, range(self.num_classes)))

    @property
    def evaluated(self) -> str:
        """The split that final figures are measured on: test, or validation if there is no test split."""
        return "validation" if self.test is None else "test"

    def train_loader(self, batch_size: int, seed: int) -> DataLoader[Any]:
        """Returns a loader of shuffled training batches.

        Args:
            batch_size: number of images.
            seed: of the generator that draws the order of one epoch after the other.
        """
        count = len(self.train)  # type: ignore[arg-type]
        order = torch.Generator().manual_seed(seed)
        from_files = isinstance(self.train, ImageSplit)
        sampler = SeededRandomSampler if from_files else RandomSampler
        collate = collate_readable if from_files else default_collate
        return DataLoader(
            self.train,
            batch_size,
            sampler=sampler(self.train, generator=order),  # type: ignore[arg-type]
            drop_last=count > batch_size and count % batch_size == 1,  # batch norm cannot train on one image
            **{"generator": order, **self._loader_args(self.train, collate)},
        )

    def eval_loader(self, batch_size: int, split: str | None = None) -> DataLoader[Any]:
        """Returns a loader of all images of a split, in order.

        Args:
            batch_size: number of images.
            split: "train", "validation" or "test"; None: the ``evaluated`` one.

        Raises:
            UsageError: the data has no such split.
        """
        data = {"train": self.train, "validation": self.validation, "test": self.test}[split or self.evaluated]
        if data is None:
            raise UsageError(f"{self.name} has no {split} split")
        return DataLoader(data, batch_size, **self._loader_args(data))

    def _loader_args(
        self, data: TorchDataset[Any], collate: Callable[[Any], Batch] = default_collate
    ) -> dict[str, Any]:
        collate = _already_collated if isinstance(data, ArraySplit) else collate
        # A loader draws a base seed for its workers: once if they persist, else in each epoch. It gets a generator of
        # its own for that, so that a resumed training, whose workers may differ, draws the same numbers elsewhere.
        generator = {"generator": torch.Generator()} if isinstance(data, ImageSplit) else {}
        collate = partial(_channels_last, collate) if self.channels_last else collate
        return {"num_workers": self.workers, "persistent_workers": self.workers > 0, "collate_fn": collate, **generator}


def _channels_last(collate: Callable[[Any], Batch], items: Any) -> Batch:
    images, labels = collate(items)
    return images.contiguous(memory_format=torch.channels_last), labels


def _already_collated(batch: Batch) -> Batch:
    return batch


def load_data(
    name: str = "digits",
    data_dir: str | Path | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    download: bool = False,
    bad: BadImages | None = None,
    augment: Mapping[str, Any] | None = None,
    class_map: Path | None = None,
) -> Dataset:
    """Opens a data set: ``digits``, ``fashion-mnist``, a name of timm's, or ``""`` for a folder of images.

    Args:
        name: for timm's names see ``timm.data.create_dataset``.
        data_dir: where the files are.
        config: for image files, the preprocessing as ``timm.data.resolve_data_config`` returns it.
        download: whether torchvision may download a data set of its own into ``data_dir``.
        bad: how many images may be unreadable, and where they are listed; None: none may be.
        augment: for image files, further arguments of ``timm.data.create_transform`` in training, such as
            ``auto_augment``.
        class_map: for folders, a text file with the name of a class a line, in the order of their numbers.

    Raises:
        UsageError: timm does not know ``augment``, or the data is held in memory and has an augmentation of its own;
            or it numbers its own classes.
        MissingError: files are absent, damaged or not laid out as expected.

    Example:
        >>> data = load_data("digits")
        >>> len(data.train), len(data.validation), len(data.test), data.input_size
        (1078, 359, 360, (1, 32, 32))
    """
    if augment and name in BUILT_IN:
        raise UsageError(f"{', '.join(augment)}: for files of images; {name} is augmented in its own way")
    if class_map is not None and name in BUILT_IN:
        raise UsageError(f"--class-map {class_map}: for folders and hfds/..., {name} numbers its own classes")
    check_name(name, has_folder=data_dir is not None)
    if name == "digits":
        return _digits()
    if name == "fashion-mnist":
        return _fashion_mnist(Path(data_dir) if data_dir else FASHION_MNIST_DIR)
    fields = open_images(name, data_dir, config or {}, download, bad or BadImages(), augment or {}, class_map)
    return Dataset(name or "folder", **fields)


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    images = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(bunch.target).long()
    order = torch.from_numpy(np.random.RandomState(0).permutation(1797))
    subsets = order[:1078], order[1078:1437], order[1437:]
    mean, std = 0.3056, 0.3231  # of the training split

    def split(subset: Tensor, shift: int = 0) -> ArraySplit:
        return ArraySplit(images[subset], labels[subset], mean=mean, std=std, fill=-mean / std, shift=shift)

    train, validation, test = split(subsets[0], shift=2), split(subsets[1]), split(subsets[2])
    return Dataset("digits", "digits-1", (1, 32, 32), (mean,), (std,), 10, train, validation, test)


def _fashion_mnist(folder: Path) -> Dataset:
    images, labels = _idx_pair(folder, "train", 60_000)
    mean, std = 0.286, 0.353

    def split(images: Tensor, labels: Tensor, shift: int = 0, flip: bool = False) -> ArraySplit:
        return ArraySplit(images, labels, mean=mean, std=std, pad=2, shift=shift, flip=flip)

    train = split(images[:55_000], labels[:55_000], shift=2, flip=True)
    validation, test = split(images[55_000:], labels[55_000:]), split(*_idx_pair(folder, "t10k", 10_000))
    return Dataset("fashion-mnist", "fashion-mnist-1", (1, 32, 32), (mean,), (std,), 10, train, validation, test)


def _idx_pair(folder: Path, part: str, count: int) -> tuple[Tensor, Tensor]:
    """Reads images uint8[n, 1, 28, 28] and labels int64[n]."""
    images = _idx(folder / f"{part}-images-idx3-ubyte.gz", (count, 28, 28))
    labels = _idx(folder / f"{part}-labels-idx1-ubyte.gz", (count,))
    return images.unsqueeze(1), labels.long()


def _idx(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Reads a gzipped IDX file of bytes: 0, 0, type 8, number of axes, then each axis as a big-endian uint32."""
    if not path.is_file():
        raise MissingError(
            f"Fashion-MNIST: no file {path}; install it (apt-get install dataset-fashion-mnist) or name its folder "
            "with --data-dir"
        )
    header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as exc:
        raise MissingError(f"{path}: cannot be unpacked ({exc}); fetch it again") from exc
    if not data.startswith(header) or len(data) != len(header) + np.prod(shape):
        raise MissingError(f"{path}: not the expected {'x'.join(map(str, shape))} bytes of Fashion-MNIST")
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=len(header)).reshape(shape).copy())
