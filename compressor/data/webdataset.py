"""Pictures in WebDataset shards, tar files on this machine: indexed once, so that each picture has its place.

timm reads them as a stream, which leaves out what it cannot read without a count, and cannot be gone on with in the
middle. With a place for each, they are pictures like those of a folder.
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
PICTURES = ("jpg", "jpeg", "png", "webp", "ppm")
MOST_CLASSES = 1_000_000
INFO = ("_info.json", "info.json")
KEY = re.compile(r"((?:.*/)?[^./][^/.]*)\.([^/]*)")  # as WebDataset has it: up to the first dot of the last part


class Shards:
    """The pictures of some shards, with their labels; a reader as timm's are.

    Args:
        paths: of tar files, not compressed, in order. In each, files of one name belong together: a picture, and
            ``.cls``, its class from 0.

    Raises MissingError for shards that are damaged, or hold a picture without a class, two of one name, or a link. What
    has a class and no picture is no sample; how many there are is logged.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.samples: list[tuple[str, int]] = []
        self._places: list[tuple[Path, int, int]] = []
        self.class_to_idx: dict[str, int] = {}
        self._alone: list[str] = []
        for path in paths:
            try:
                with tarfile.open(path, "r:") as shard:
                    self._index(path, shard)
            except (tarfile.TarError, OSError, ValueError, OverflowError) as exc:  # of numbers no file can have
                raise MissingError(f"shard {path}: cannot be read ({exc}); a plain .tar is expected") from exc
        if self._alone:
            kinds = ", ".join(f".{kind}" for kind in PICTURES)
            _log.warning("%s samples have a class and no picture (%s), as %s", len(self._alone), kinds, self._alone[0])

    def _index(self, path: Path, shard: tarfile.TarFile) -> None:
        for key, files in _samples(path, shard):
            picture = next((files[kind] for kind in PICTURES if kind in files), None)
            if picture is None:
                self._alone += [f"{path.name}/{key}"] if "cls" in files else []
                continue
            label = shard.extractfile(files["cls"]) if "cls" in files else None
            said = b"" if label is None else label.read(32).strip()
            if not said.isdigit() or int(said) >= MOST_CLASSES:
                what = "no .cls beside it" if label is None else f"the class {said!r}"
                where = f"expected a number from 0, below {MOST_CLASSES:,}, in {key}.cls"
                raise MissingError(f"shard {path}: {key} has {what}, {where}")
            self.samples.append((f"{path.name}/{key}", int(said)))
            self._places.append((path, picture.offset_data, picture.size))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        path, offset, size = self._places[index]
        with path.open("rb") as shard:  # anew each time: loaders' processes must not share a position
            shard.seek(offset)
            return io.BytesIO(shard.read(size)), self.samples[index][1]

    def filename(self, index: int) -> str:
        """Name a picture: its shard, and its key there."""
        return self.samples[index][0]


def open_shards(folder: Path) -> dict[str, Shards]:
    """Open the splits in a folder of shards, train and validation and perhaps test.

    Which shards are whose is in ``_info.json``, where there is one, as timm writes it; else it is in their names.

    Raises MissingError where there are none, or they are not as expected.
    """
    named = _said(folder) or {split: _called(folder, words) for split, words in SPLITS.items()}
    splits = {split: Shards(paths) for split, paths in named.items() if paths}
    for split in ("train", "validation"):
        if not splits.get(split):
            raise MissingError(f"{folder}: no pictures for {split}; expected shards such as {split}-0000.tar")
    count = 1 + max(label for shards in splits.values() for _, label in shards.samples)
    for shards in splits.values():
        shards.class_to_idx = {str(label): label for label in range(count)}
    return splits


def _said(folder: Path) -> dict[str, list[Path]]:
    """Read which shards are whose."""
    path = next((folder / name for name in INFO if (folder / name).is_file()), None)
    if path is None:
        return {}
    try:
        splits = json.loads(path.read_text(encoding="utf-8"))["splits"]
        known = {split: [splits[word] for word in words if word in splits] for split, words in SPLITS.items()}
        return {split: [folder / name for name in found[0]["filenames"]] for split, found in known.items() if found}
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise MissingError(f"{path}: cannot be read ({type(exc).__name__}: {exc})") from exc


def _called(folder: Path, words: Sequence[str]) -> list[Path]:
    word = re.compile(rf"(?<![a-z])({'|'.join(words)})(?![a-z])", re.IGNORECASE)
    return sorted(path for path in folder.glob("*.tar") if word.search(path.stem))


def _samples(path: Path, shard: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Give the files of each sample, by what follows the first dot of their name: they are next to each other."""
    key, files = "", dict[str, tarfile.TarInfo]()
    for member in shard:
        found = None if member.isdir() else KEY.fullmatch(member.name)
        if found is None:
            continue
        if found[1] != key:
            if files:
                yield key, files
            key, files = found[1], {}
        kind = found[2].lower()
        _check(path, member, kind, kind in files)
        if member.isfile():
            files[kind] = member
    if files:
        yield key, files


def _check(path: Path, member: tarfile.TarInfo, kind: str, twice: bool) -> None:
    """Raise MissingError for a picture or class that does not lie in the shard as it is, or would hide another."""
    if kind not in (*PICTURES, "cls"):
        return
    what = "a link" if member.issym() or member.islnk() else "a sparse file" if member.issparse() else ""
    if what:
        how = "its bytes; pack with tar --dereference --hard-dereference, without --sparse"
        raise MissingError(f"shard {path}: {member.name} is {what}, expected {how}")
    if twice:
        raise MissingError(f"shard {path}: {member.name} is there twice; expected one picture and class of each name")
