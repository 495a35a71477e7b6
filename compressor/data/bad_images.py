"""Pictures that cannot be read: counted, listed, and never replaced by others."""

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


class BadImages:
    """The unreadable pictures of a data set.

    Args:
        most: how many there may be, in all splits together.
        path: of a list of them, a line each; made when the first is found. None for no list.
    """

    def __init__(self, most: int = 0, path: Path | None = None) -> None:
        self.most, self.path = most, path
        self.splits: list[BadSplit] = []
        self._known = 0

    def of(self, name: str, pictures: int) -> BadSplit:
        """Make the record of a split."""
        self.splits.append(BadSplit(self, name, pictures))
        return self.splits[-1]

    def check(self) -> None:
        """List what has been found since the last time, in all processes.

        Raises MissingError where there are more than there may be.
        """
        lines = [line for split in self.splits for line in split.lines()]
        if len(lines) > self._known:
            self._known = len(lines)
            main_process_first(lambda: self._write(lines))
        where = "" if self.path is None else f"; see {self.path}"
        if len(lines) > self.most:
            error = MissingError(
                f"{len(lines)} of the pictures opened cannot be read, {self.most} may be: {lines[0]}{where}; repair or "
                f"remove them, or allow them: --max-bad-images {len(lines)} (BadImages({len(lines)}))"
            )
            error.shared = True
            raise error

    def _write(self, lines: list[str]) -> None:
        if self.path is None:
            return
        try:
            write_atomically(self.path, "".join(f"{line}\n" for line in lines).encode(errors="replace"), force=True)
        except ResourceError as exc:
            _log.warning("%s", exc)
        if len(lines) <= self.most:
            _log.warning("%s of the pictures opened cannot be read, left out; see %s", len(lines), self.path)


class BadSplit:
    """Which pictures of a split could not be read, as found in whatever process opens them.

    Args:
        all_splits: that it is part of.
        name: of the split.
        pictures: how many it has.
    """

    def __init__(self, all_splits: BadImages, name: str, pictures: int) -> None:
        self.all_splits, self.name = all_splits, name
        self.found: Tensor = torch.zeros(pictures, dtype=torch.uint8).share_memory_()  # loaders' processes write it
        self.explain: Callable[[int], str] = str

    def add(self, index: int) -> None:
        """Note one."""
        self.found[index] = 1

    def lines(self) -> list[str]:
        """Tell of each one its split, its name, and why."""
        found = self.found.int()
        all_reduce_sum([found])
        return [f"{self.name}: {self.explain(index)}" for index in found.nonzero().flatten().tolist()]
