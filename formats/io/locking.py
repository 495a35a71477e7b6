"""Locks that reserve a file for one process, from before long work until the file is written.

The filelock package is not used: on file systems without locks it falls back to files that outlive a killed process.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from compressor.formats.errors import ResourceError

__all__ = ["holding", "sweep_locks"]

_LOCK = re.compile(r"\.timm-compressor-[0-9a-f]{16}\.lock")


@contextlib.contextmanager
def holding(path: str | os.PathLike[str], shared: bool = False) -> Iterator[None]:
    """Holds the lock of a file within the ``with`` block; the system releases it when the process is killed.

    The lock is advisory: it stops other users of ``holding``, not ``write_atomically``. Where there are no locks, as on
    Windows and some file systems, or the folder cannot be written, nothing is locked: the last writer's file remains.

    Args:
        path: the file that is going to be written.
        shared: with others that hold it shared, too; nobody else can hold it meanwhile.

    Raises:
        ResourceError: another process holds the lock.
    """
    target = Path(os.path.realpath(path))
    lock = target.parent / f".timm-compressor-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}.lock"
    try:
        descriptor = _lock(lock, shared)
    except BlockingIOError as error:
        raise ResourceError(
            f"{path} is going to be written by another process: wait until it has ended, or give another name"
        ) from error
    except (OSError, ImportError):
        descriptor = None
    try:
        yield
    finally:
        if descriptor is not None:
            _unlock(lock, descriptor)


def sweep_locks(folder: Path) -> None:
    """Removes the lock files of processes that no longer run.

    Raises:
        OSError: the folder cannot be read.
    """
    for entry in os.listdir(folder):
        if _LOCK.fullmatch(entry):
            with contextlib.suppress(OSError, ImportError):
                _unlock(folder / entry, _lock(folder / entry))


def _lock(path: Path, shared: bool = False) -> int:
    """Returns the descriptor of a lock file, created if need be and locked; BlockingIOError where another has it."""
    import fcntl  # not on Windows

    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink:  # otherwise its last holder has removed it in the meantime
                return descriptor
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _unlock(path: Path, descriptor: int) -> None:
    """Removes a lock file before it is unlocked, so that nobody else can hold it under this name.

    Where others share the lock, the file stays for the last of them.
    """
    import fcntl

    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    os.close(descriptor)
