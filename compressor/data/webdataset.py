"""WebDataset shards, local tar files of images: indexed once, so that each image can be read at random.

timm reads them as a stream, which silently leaves out what it cannot read and cannot be resumed in the middle. Once
indexed, they are read like the images of a folder.
"""

from __future__ import annotations

import io
import json
import logging
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from compressor.formats.errors import MissingError

__all__ = ["Shards", "open_shards"]

_log = logging.getLogger(__name__)
SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}
EXTENSIONS = ("jpg", "jpeg", "png", "webp", "ppm")
MAX_CLASSES = 1_000_000
INFO = ("_info.json", "info.json")
KEY = re.compile(r"((?:.*/)?[^./][^/.]*)\.([^/]*)")  # WebDataset's rule: up to the first dot of the file name


class Shards:
    """The images of some shards, with their labels; it has the interface of timm's readers.

    Samples that have a class but no image are left out, and their number is logged.

    Args:
        paths: the tar files, uncompressed, in order. Files of one name belong to one sample: an image, and ``.cls``,
            its class from 0.

    Raises:
        MissingError: a shard is damaged, or has an image without a class, two files of one name, or a link.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.samples: list[tuple[str, int]] = []
        self._places: list[tuple[Path, int, int]] = []
        self.class_to_idx: dict[str, int] = {}
        self._without_image: list[str] = []
        for path in paths:
            try:
                with tarfile.open(path, "r:") as shard:
                    self._index(path, shard)
            except (tarfile.TarError, OSError, ValueError, OverflowError) as exc:  # a damaged header
                raise MissingError(f"shard {path}: cannot be read ({exc}); a plain .tar is expected") from exc
        if self._without_image:
            kinds = ", ".join(f".{kind}" for kind in EXTENSIONS)
            count, first = len(self._without_image), self._without_image[0]
            _log.warning("%s samples have a class and no image (%s), as %s", count, kinds, first)

    def _index(self, path: Path, shard: tarfile.TarFile) -> None:
        for key, files in _samples(path, shard):
            image = next((files[kind] for kind in EXTENSIONS if kind in files), None)
            if image is None:
                self._without_image += [f"{path.name}/{key}"] if "cls" in files else []
                continue
            label = shard.extractfile(files["cls"]) if "cls" in files else None
            text = b"" if label is None else label.read(32).strip()
            if not text.isdigit() or int(text) >= MAX_CLASSES:
                what = "no .cls beside it" if label is None else f"the class {text!r}"
                where = f"expected a number from 0, below {MAX_CLASSES:,}, in {key}.cls"
                raise MissingError(f"shard {path}: {key} has {what}, {where}")
            self.samples.append((f"{path.name}/{key}", int(text)))
            self._places.append((path, image.offset_data, image.size))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        path, offset, size = self._places[index]
        with path.open("rb") as shard:  # opened each time, because worker processes must not share a file position
            shard.seek(offset)
            return io.BytesIO(shard.read(size)), self.samples[index][1]

    def filename(self, index: int) -> str:
        """Returns the name of an image: its shard, and its key there."""
        return self.samples[index][0]


def open_shards(folder: Path) -> dict[str, Shards]:
    """Opens the splits of a folder of shards: train, validation and possibly test.

    ``_info.json``, as timm writes it, assigns the shards to splits; without it their names do.

    Args:
        folder: holds the shards.

    Returns:
        The shards by split.

    Raises:
        MissingError: there are no shards, or they are not as expected.
    """
    listed = _listed(folder) or {split: _named_after(folder, words) for split, words in SPLITS.items()}
    splits = {split: Shards(paths) for split, paths in listed.items() if paths}
    for split in ("train", "validation"):
        if not splits.get(split):
            raise MissingError(f"{folder}: no images for {split}; expected shards such as {split}-0000.tar")
    count = 1 + max(label for shards in splits.values() for _, label in shards.samples)
    for shards in splits.values():
        shards.class_to_idx = {str(label): label for label in range(count)}
    return splits


def _listed(folder: Path) -> dict[str, list[Path]]:
    """Reads which shards belong to which split from the information file; empty if there is none."""
    path = next((folder / name for name in INFO if (folder / name).is_file()), None)
    if path is None:
        return {}
    try:
        splits = json.loads(path.read_text(encoding="utf-8"))["splits"]
        entries = {split: [splits[word] for word in words if word in splits] for split, words in SPLITS.items()}
        return {split: [folder / name for name in entry[0]["filenames"]] for split, entry in entries.items() if entry}
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise MissingError(f"{path}: cannot be read ({type(exc).__name__}: {exc})") from exc


def _named_after(folder: Path, words: Sequence[str]) -> list[Path]:
    word = re.compile(rf"(?<![a-z])({'|'.join(words)})(?![a-z])", re.IGNORECASE)
    return sorted(path for path in folder.glob("*.tar") if word.search(path.stem))


def _samples(path: Path, shard: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Yields key and files of each sample; files are keyed by what follows the first dot of their names.

    The files of a sample are neighbours in the shard.
    """
    key, files = "", dict[str, tarfile.TarInfo]()
    for member in shard:
        match = None if member.isdir() else KEY.fullmatch(member.name)
        if match is None:
            continue
        if match[1] != key:
            if files:
                yield key, files
            key, files = match[1], {}
        kind = match[2].lower()
        _check(path, member, kind, kind in files)
        if member.isfile():
            files[kind] = member
    if files:
        yield key, files


def _check(path: Path, member: tarfile.TarInfo, kind: str, twice: bool) -> None:
    """Raises MissingError for an image or class that is a link or a sparse file, or there twice."""
    if kind not in (*EXTENSIONS, "cls"):
        return
    what = "a link" if member.issym() or member.islnk() else "a sparse file" if member.issparse() else ""
    if what:
        how = "its bytes; pack with tar --dereference --hard-dereference, without --sparse"
        raise MissingError(f"shard {path}: {member.name} is {what}, expected {how}")
    if twice:
        raise MissingError(f"shard {path}: {member.name} is there twice; expected one image and class of each name")
