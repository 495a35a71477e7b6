"""Images of a folder, or of any data set that timm can open, with timm's preprocessing."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressor.data.bad_images import BadImages
from compressor.data.splits import ImageSplit
from compressor.data.webdataset import open_shards
from compressor.formats.errors import MissingError, UsageError

__all__ = ["open_images"]

_STREAMS = ("hfids", "tfds")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def open_images(
    name: str,
    data_dir: str | Path | None,
    config: Mapping[str, Any],
    download: bool,
    bad: BadImages,
    augment: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the fields of a ``datasets.Dataset`` of images; takes and raises what ``datasets.load_data`` does."""
    from timm.data import create_transform

    if data_dir is not None and not Path(data_dir).is_dir():
        raise MissingError(f"--data-dir {data_dir}: no such folder")
    preprocessing = _preprocessing(config)
    size = preprocessing["input_size"]
    mode = "L" if size[0] == 1 else "RGB"
    sources = _sources(name, data_dir, mode, download)
    classes = _class_count(sources, data_dir)
    views: dict[str, ImageSplit] = {}
    for split, source in sources.items():
        try:
            extra = augment if split == "train" else {}
            transform = create_transform(**preprocessing, **extra, is_training=split == "train")
        except (AssertionError, ValueError, TypeError, KeyError) as exc:  # timm checks its arguments by assertions
            raise UsageError(f"{dict(augment)}: timm makes no augmentation of it ({exc})") from exc
        views[split] = ImageSplit(source, transform, mode, size, bad.add_split(split, len(source)))
    return {
        "version": _fingerprint(sources, augment),
        "num_classes": classes,
        "input_size": size,
        "mean": preprocessing["mean"],
        "std": preprocessing["std"],
        "train": views["train"],
        "validation": views["validation"],
        "test": views.get("test"),
        "workers": min(4, os.cpu_count() or 1),
    }


def _preprocessing(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the part of a model's configuration that ``timm.data.create_transform`` needs.

    Raises:
        UsageError: the model takes neither 1 channel nor 3.

    Example:
        >>> _preprocessing({"input_size": (1, 32, 32), "mean": (0.25, 0.5, 0.75), "std": (0.5, 0.5, 0.5)})
        {'mean': (0.5,), 'std': (0.5,), 'input_size': (1, 32, 32)}
    """
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    chosen: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "input_size": (3, 224, 224)}
    chosen |= {key: config[key] for key in keys if key in config}
    channels = chosen["input_size"][0]
    if channels not in (1, 3):
        raise UsageError(f"--in-chans {channels}: pictures are opened with 1 channel or with 3")
    for key in ("mean", "std"):  # a model of grey images takes the mean over the colours
        values = tuple(chosen[key])
        chosen[key] = values if len(values) == channels else (sum(values) / len(values),) * channels
    return {**chosen, "input_size": tuple(chosen["input_size"])}


def _sources(name: str, data_dir: str | Path | None, mode: str, download: bool) -> dict[str, Any]:
    """Opens train and validation, and test if there is one."""
    kind = name.partition("/")[0].lower()
    if data_dir is None and kind not in ("hfds", *_STREAMS):  # the hub has a folder of its own
        files = "shards" if kind == "wds" else "files"
        raise MissingError(f"data set {name or 'folder'}: name the folder of its {files} with --data-dir")
    if kind == "wds" and data_dir is not None:
        return dict(open_shards(Path(data_dir)))
    splits = ["train", "validation"]
    if data_dir is not None and (Path(data_dir) / "test").is_dir():
        splits.append("test")
    return {split: _source(name, data_dir, split, mode, download) for split in splits}


def _source(name: str, data_dir: str | Path | None, split: str, mode: str, download: bool) -> Any:
    from timm.data import create_dataset

    if name.partition("/")[0].lower() in _STREAMS:
        raise UsageError(
            f"--dataset {name}: a stream does not know its classes, and timm leaves out, without a word, what "
            "cannot be read: it cannot be used; name a folder, wds/... or hfds/..."
        )
    root = None if data_dir is None else str(data_dir)
    try:
        with contextlib.redirect_stdout(None):  # timm prints what to install
            return create_dataset(name, root, split, download=download, input_img_mode=mode)
    except ModuleNotFoundError as exc:
        raise MissingError(f"data set {name} needs a package that is not installed: pip install {exc.name}") from exc
    except (RuntimeError, OSError, AssertionError, ImportError, ValueError) as exc:
        raise MissingError(f"data set {name or data_dir}, split {split}: {' '.join(str(exc).split())}") from exc


def _class_count(sources: Mapping[str, Any], data_dir: str | Path | None) -> int:
    """Returns the number of classes; raises MissingError unless the splits are separate and have the same classes."""
    readers = {split: getattr(source, "reader", source) for split, source in sources.items()}
    maps = {split: getattr(reader, "class_to_idx", None) for split, reader in readers.items()}
    for split, reader in readers.items():
        root = getattr(reader, "root", None)
        if hasattr(reader, "samples") and root is not None and data_dir is not None and Path(root) == Path(data_dir):
            raise MissingError(f"{data_dir}: no folder for {split}; expected train/CLASS/*.jpg and val/CLASS/*.jpg")
        if maps[split] != maps["train"]:
            unmatched = sorted(set(maps[split] or {}) ^ set(maps["train"] or {}))
            raise MissingError(f"{data_dir}: train and {split} have different classes: {', '.join(unmatched[:5])}")
    if not maps["train"]:
        raise MissingError("the data set does not say its classes")
    return len(maps["train"])


def _fingerprint(sources: Mapping[str, Any], augment: Mapping[str, Any]) -> str:
    """Returns a short hash of the images and labels of each split and of their augmentation."""
    digest = hashlib.sha256(repr(sorted(augment.items())).encode() if augment else b"")
    for split, source in sources.items():
        reader = getattr(source, "reader", source)
        digest.update(f"{split} {len(reader)}\n".encode())
        root = str(getattr(reader, "root", ""))
        for path, target in getattr(reader, "samples", ()):
            line = f"{os.path.relpath(path, root)} {target}\n"
            digest.update(line.encode(errors="surrogateescape"))  # file names need not be UTF-8
    return f"pictures-{digest.hexdigest()[:16]}"
