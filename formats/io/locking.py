"""Keep a file to be written for one process, from before the long work until it is written.

Not filelock's locks: where a file system has none, those become files that outlive a process that is killed.
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
def holding(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold ``path`` within the block; the kernel lets go of it too when the process is killed.

    Only who asks is kept from writing: ``write_atomically`` itself does not. Where the file system has no locks, as on
    Windows, or the folder cannot be written, nothing is held, and of two writers the last one's file stays.

    Raises:
        ResourceError: another process holds it.
    """
    target = Path(os.path.realpath(path))
    lock = target.parent / f".timm-compressor-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}.lock"
    try:
        descriptor = _lock(lock)
    except BlockingIOError as error:
        raise ResourceError(
            f"{path} is what another process is going to write: wait until it has ended, or give another name"
        ) from error
    except (OSError, ImportError):
        descriptor = None
    try:
        yield
    finally:
        if descriptor is not None:
            _unlock(lock, descriptor)


def sweep_locks(folder: Path) -> None:
    """Remove the locks of processes that no longer run; OSError where the folder cannot be read."""
    for entry in os.listdir(folder):
        if _LOCK.fullmatch(entry):
            with contextlib.suppress(OSError, ImportError):
                _unlock(folder / entry, _lock(folder / entry))


def _lock(path: Path) -> int:
    """Give the descriptor that holds ``path``, made if need be; BlockingIOError where another holds it."""
    import fcntl  # which Windows lacks

    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink:  # else its last holder has removed it meanwhile
                return descriptor
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _unlock(path: Path, descriptor: int) -> None:
    """Remove the file while it is held, so that nobody can hold it under this name at the same time."""
    with contextlib.suppress(OSError):
        path.unlink()
    os.close(descriptor)
