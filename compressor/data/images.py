"""Images of a folder, or of any data set that timm can open, with timm's preprocessing."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressor.data.bad_images import BadImages
from compressor.data.folder_notes import folder_notes, listed
from compressor.data.preprocessing import resolve_preprocessing
from compressor.data.splits import ImageSplit
from compressor.data.webdataset import open_shards
from compressor.formats.errors import MissingError, UsageError

__all__ = ["open_images"]

_STREAMS = ("hfids", "tfds")


def open_images(
    name: str,
    data_dir: str | Path | None,
    config: Mapping[str, Any],
    download: bool,
    bad: BadImages,
    augment: Mapping[str, Any],
    class_map: Path | None,
) -> dict[str, Any]:
    """Returns the fields of a ``datasets.Dataset`` of images; takes and raises what ``datasets.load_data`` does."""
    if data_dir is not None and not Path(data_dir).is_dir():
        raise MissingError(f"{data_dir}: no such folder")
    preprocessing = resolve_preprocessing({}, config)
    size = preprocessing.pop("input_size")
    if size[0] not in (1, 3):
        raise UsageError(f"--in-chans {size[0]}: images are opened with 1 channel or with 3")
    mode = "L" if size[0] == 1 else "RGB"
    _check_class_map(class_map, name)
    sources = _sources(name, data_dir, mode, download, class_map)
    classes = _classes(sources, data_dir)
    views = {
        split: ImageSplit(
            source, _transform(split, size, preprocessing, augment), mode, size, bad.add_split(split, len(source))
        )
        for split, source in sources.items()
    }
    return {
        "version": _fingerprint(sources, {**augment, **preprocessing, "input_size": size}),
        "num_classes": len(classes),
        "classes": () if classes == tuple(map(str, range(len(classes)))) else classes,
        "input_size": size,
        "mean": preprocessing.pop("mean"),
        "std": preprocessing.pop("std"),
        "resizing": preprocessing,
        "notes": folder_notes({split: getattr(source, "reader", source) for split, source in sources.items()}),
        "train": views["train"],
        "validation": views["validation"],
        "test": views.get("test"),
        "workers": min(4, os.cpu_count() or 1),
    }


def _transform(
    split: str, size: tuple[int, int, int], preprocessing: Mapping[str, Any], augment: Mapping[str, Any]
) -> Any:
    """Returns timm's transform of the images of a split; those of the training are augmented."""
    from timm.data import create_transform

    is_training = split == "train"
    try:
        return create_transform(size, **preprocessing, **(augment if is_training else {}), is_training=is_training)
    except (AssertionError, ValueError, TypeError, KeyError) as exc:  # timm checks its arguments by assertions
        raise UsageError(f"{dict(augment)}: timm makes no augmentation of it ({exc})") from exc


def _check_class_map(class_map: Path | None, name: str) -> None:
    if class_map is None:
        return
    if name and not name.lower().startswith("hfds/"):
        raise UsageError(f"--class-map {class_map}: for folders and hfds/..., {name} numbers its own classes")
    if class_map.suffix.lower() != ".txt":
        raise UsageError(f"--class-map {class_map}: expected a .txt with the name of a class a line")
    if not class_map.is_file():
        raise MissingError(f"--class-map {class_map}: no such file")


def _sources(
    name: str, data_dir: str | Path | None, mode: str, download: bool, class_map: Path | None
) -> dict[str, Any]:
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
    more = {"download": download, "input_img_mode": mode, "class_map": None if class_map is None else str(class_map)}
    return {split: _source(name, data_dir, split, more) for split in splits}


def _source(name: str, data_dir: str | Path | None, split: str, more: Mapping[str, Any]) -> Any:
    from timm.data import create_dataset

    if name.partition("/")[0].lower() in _STREAMS:
        raise UsageError(
            f"--dataset {name}: a stream does not know its classes, and timm leaves out, without a word, what "
            "cannot be read: it cannot be used; name a folder, wds/... or hfds/..."
        )
    root = None if data_dir is None else str(data_dir)
    try:
        with contextlib.redirect_stdout(None):  # timm prints what to install
            return create_dataset(name, root, split, **more)
    except ModuleNotFoundError as exc:
        raise MissingError(f"data set {name} needs a package that is not installed: pip install {exc.name}") from exc
    except (RuntimeError, OSError, AssertionError, ImportError, ValueError) as exc:
        raise MissingError(f"data set {name or data_dir}, split {split}: {' '.join(str(exc).split())}") from exc


def _classes(sources: Mapping[str, Any], data_dir: str | Path | None) -> tuple[str, ...]:
    """Returns the names of the classes, "" where a number has none.

    Raises:
        MissingError: the splits are not separate, or have different classes.
    """
    readers = {split: getattr(source, "reader", source) for split, source in sources.items()}
    maps = {split: getattr(reader, "class_to_idx", None) for split, reader in readers.items()}
    for split, reader in readers.items():
        root = getattr(reader, "root", None)
        if hasattr(reader, "samples") and root is not None and data_dir is not None and Path(root) == Path(data_dir):
            raise MissingError(f"{data_dir}: no folder for {split}; expected train/CLASS/*.jpg and val/CLASS/*.jpg")
        if maps[split] != maps["train"]:
            raise MissingError(_different_classes(readers, split, data_dir))
    if not maps["train"]:
        raise MissingError("the data set does not say its classes")
    names = {int(number): str(name) for name, number in maps["train"].items()}
    return tuple(names.get(number, "") for number in range(max(names) + 1))


def _different_classes(readers: Mapping[str, Any], split: str, data_dir: str | Path | None) -> str:
    """Returns the message that two splits have different classes, with the reason where the folder shows one."""
    one, two = (set(getattr(readers[name], "class_to_idx", None) or {}) for name in ("train", split))
    unmatched = listed(name or "images outside the folder of a class" for name in sorted(one ^ two))
    lines = "; ".join(folder_notes({name: readers[name] for name in ("train", split)}))
    return f"{data_dir}: train and {split} have different classes: {unmatched}{f' ({lines})' if lines else ''}"


def _fingerprint(sources: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Returns a short hash of the images and labels of each split, and of how they are prepared and augmented."""
    digest = hashlib.sha256(repr(sorted(settings.items())).encode())
    for split, source in sources.items():
        reader = getattr(source, "reader", source)
        digest.update(f"{split} {len(reader)}\n".encode())
        root = str(getattr(reader, "root", ""))
        for path, target in getattr(reader, "samples", ()):
            line = f"{os.path.relpath(path, root)} {target}\n"
            digest.update(line.encode(errors="surrogateescape"))  # file names need not be UTF-8
    return f"pictures-{digest.hexdigest()[:16]}"
