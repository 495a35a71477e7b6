"""Sources of the bytes of a packed file: a file that is opened once, or memory."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path
from typing import Protocol

from compressor.formats.errors import FormatError, MissingError, ResourceError

__all__ = ["FileSource", "MemorySource", "Source"]


class Source(Protocol):
    """Random access to the ``size`` bytes of a packed file."""

    size: int

    def read(self, start: int, size: int) -> memoryview:
        """Returns exactly ``size`` bytes from position ``start`` on, which the caller keeps within the source."""

    def close(self) -> None:
        """Releases the file."""


class MemorySource:
    """A packed file in memory."""

    def __init__(self, data: bytes) -> None:
        self.size = len(data)
        self._data = memoryview(data)

    def read(self, start: int, size: int) -> memoryview:
        """Returns a view of the bytes, without a copy."""
        return self._data[start : start + size]

    def close(self) -> None:
        """Does nothing, since memory needs no release."""


class FileSource:
    """A packed file on disk, read through one descriptor, so that replacing the file at the path has no effect.

    The file is not mapped into memory: when another process truncates a mapped file, SIGBUS kills its reader.

    Args:
        path: the file.

    Raises:
        MissingError: it does not exist.
        FormatError: it is a folder or another thing that is not a regular file.
        ResourceError: it cannot be opened.

    Attributes:
        size: its size in bytes when it was opened.
        bytes_read: bytes read so far, by all threads.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._descriptor = self._open()
        status = os.fstat(self._descriptor)
        self.size = status.st_size
        self.bytes_read = 0
        self._counter_lock = threading.Lock()
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise FormatError("not a regular file, expected a packed file")

    def _open(self) -> int:
        try:
            # The type is checked before opening, since opening a device may act on it. With O_NONBLOCK a FIFO that
            # takes the file's place between the two calls does not block.
            if not stat.S_ISREG(os.stat(self._path).st_mode):
                kind = "a folder" if self._path.is_dir() else "not a regular file"
                raise FormatError(f"{self._path}: {kind}, expected a packed file")
            return os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise MissingError(f"{self._path}: no such file, expected a packed file") from error
        except (OSError, ValueError) as error:  # ValueError: the path contains NUL
            raise ResourceError(f"{self._path}: cannot be opened ({error})") from error

    def read(self, start: int, size: int) -> memoryview:
        """Returns exactly ``size`` bytes from position ``start`` on; may be called by several threads.

        Raises:
            FormatError: the file has become shorter since it was opened.
            ResourceError: the system cannot read it.
        """
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
        with self._counter_lock:
            self.bytes_read += size
        return view.toreadonly()

    def close(self) -> None:
        """Closes the descriptor; further calls have no effect."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
