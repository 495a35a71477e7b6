"""Images that cannot be read: they are counted and listed, and never replaced by others."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from compressor.distributed.collectives import all_reduce_sum, main_process_first
from compressor.formats.errors import MissingError, ResourceError
from compressor.formats.io.atomic import write_atomically

__all__ = ["BadImages", "BadSplit"]

_log = logging.getLogger(__name__)
_SHOWN = 10  # images that an error names


class BadImages:
    """The unreadable images of a data set.

    Args:
        most: how many there may be, in all splits together.
        path: the file that lists them, one per line, written when the first is found; None for no list. What it held
            before is replaced, and a warning says so where that was not the same list.
    """

    def __init__(self, most: int = 0, path: Path | None = None) -> None:
        self.most, self.path = most, path
        self.splits: list[BadSplit] = []
        self._listed = 0
        self._is_own = False  # whether the file is the list of this run

    def add_split(self, name: str, images: int) -> BadSplit:
        """Creates and returns the record of one split.

        Args:
            name: the split's name.
            images: its number of images.
        """
        self.splits.append(BadSplit(self, name, images))
        return self.splits[-1]

    def check(self) -> None:
        """Writes the list if more unreadable images have been found, in any process, since the last call.

        Raises:
            MissingError: there are more than ``most``.
        """
        lines = [line for split in self.splits for line in split.lines()]
        if len(lines) > self._listed:
            self._listed = len(lines)
            main_process_first(lambda: self._write(lines))
        if len(lines) > self.most:
            more = f" and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
            where = "" if self.path is None else f"; all are in {self.path}"
            error = MissingError(
                f"{len(lines)} of the images opened cannot be read, {self.most} allowed: {'; '.join(lines[:_SHOWN])}"
                f"{more}{where}; repair or remove them, or allow them: --max-bad-images {len(lines)}"
            )
            error.shared = True
            raise error

    def _write(self, lines: list[str]) -> None:
        if self.path is None:
            return
        content = "".join(f"{line}\n" for line in lines).encode(errors="replace")
        try:
            if not self._is_own and self.path.is_file() and self.path.read_bytes() != content:
                _log.warning("%s is replaced; it listed other images, or something else", self.path)
            write_atomically(self.path, content, force=True)
            self._is_own = True
        except (ResourceError, OSError) as exc:
            _log.warning("%s", exc)
        if len(lines) <= self.most:
            _log.warning("%s of the images opened cannot be read, left out; see %s", len(lines), self.path)


class BadSplit:
    """The unreadable images of one split, recorded by whichever process opens them.

    Args:
        all_splits: the record that this one is part of.
        name: the split's name.
        images: its number of images.
    """

    def __init__(self, all_splits: BadImages, name: str, images: int) -> None:
        self.all_splits, self.name = all_splits, name
        self.unreadable: Tensor = torch.zeros(images, dtype=torch.uint8).share_memory_()  # written by worker processes
        self.explain: Callable[[int], str] = str

    def add(self, index: int) -> None:
        """Records the image at ``index`` as unreadable."""
        self.unreadable[index] = 1

    def lines(self) -> list[str]:
        """Returns a line for each unreadable image: its split, its name and the reason."""
        reports = self.unreadable.int()
        all_reduce_sum([reports])
        return [f"{self.name}: {self.explain(index)}" for index in reports.nonzero().flatten().tolist()]
