"""Bytes to read from: a file opened once, or memory."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path
from typing import Protocol

from compressor.formats.errors import FormatError, MissingError, ResourceError

__all__ = ["FileSource", "MemorySource", "Source"]


class Source(Protocol):
    """Random access to the bytes of a packed file."""

    size: int

    def read(self, start: int, size: int) -> memoryview:
        """Give exactly ``size`` bytes from ``start``."""

    def close(self) -> None:
        """Let go of the file."""


class MemorySource:
    """A packed file in memory."""

    def __init__(self, data: bytes) -> None:
        self.size = len(data)
        self._data = memoryview(data)

    def read(self, start: int, size: int) -> memoryview:
        """Give a view of the bytes."""
        return self._data[start : start + size]

    def close(self) -> None:
        """Do nothing."""


class FileSource:
    """A packed file on disk, through one descriptor: replacing the path changes nothing.

    Not mapped: a mapped file that another process cuts short kills the reader with SIGBUS.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._descriptor = self._open()
        status = os.fstat(self._descriptor)
        self.size = status.st_size
        self.bytes_read = 0
        self._counting = threading.Lock()
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise FormatError("not a regular file, expected a packed file")

    def _open(self) -> int:
        try:
            # asked before opening, since opening a device may act on it; O_NONBLOCK lest a FIFO put there since blocks
            if not stat.S_ISREG(os.stat(self._path).st_mode):
                kind = "a folder" if self._path.is_dir() else "not a regular file"
                raise FormatError(f"{self._path}: {kind}, expected a packed file")
            return os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise MissingError(f"{self._path}: no such file, expected a packed file") from error
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise ResourceError(f"{self._path}: cannot be opened ({error})") from error

    def read(self, start: int, size: int) -> memoryview:
        """Read the bytes; raises FormatError where the file has become shorter."""
        data = bytearray(size)
        view = memoryview(data)
        done = 0
        while done < size:
            try:
                got = os.preadv(self._descriptor, [view[done:]], start + done)
            except OSError as error:
                raise ResourceError(f"{self._path}: cannot be read ({error})") from error
            if not got:
                raise FormatError("the file became shorter while it was read")
            done += got
        with self._counting:  # sites are decoded in several threads
            self.bytes_read += size
        return view.toreadonly()

    def close(self) -> None:
        """Close the descriptor; twice does no harm."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
