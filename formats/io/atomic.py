"""Put a file in place whole or not at all, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import secrets
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from compressor.formats.errors import ResourceError, UsageError
from compressor.formats.io.locking import sweep_locks

__all__ = ["check_writable", "write_atomically"]

_ATTEMPTS = 3
_WITHOUT = {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.ENOTSUP}  # said by file systems that lack rename or fsync

# A temporary file names its machine and process, so that the next writer can tell the litter of a dead one.
_MACHINE = f"{zlib.crc32(platform.node().encode()):08x}"
_TEMPORARY = re.compile(rf"\.timm-compressor-{_MACHINE}-(\d+)-[0-9a-f]{{16}}\.tmp")


def check_writable(path: str | os.PathLike[str], force: bool) -> None:
    """Tell, before the long work, whether ``path`` could be written: a temporary file is made beside it.

    Raises:
        UsageError: it exists, and ``force`` is not set.
        ResourceError: it is no regular file, or its folder is missing or cannot be written.
    """
    target = _target(path, force)
    descriptor, temporary = _create_beside(target)
    os.close(descriptor)
    temporary.unlink(missing_ok=True)


def write_atomically(
    path: str | os.PathLike[str],
    data: bytes | Sequence[bytes | memoryview],
    verify: Callable[[Path], None] | None = None,
    force: bool = False,
) -> None:
    """Write ``data`` to a temporary file beside ``path``, verify it, put it in place.

    On return the file is on disk under its name. On any error the old file, if any, is as it was and nothing
    is left behind; what a killed process left is swept by the next call in the same folder. A link is followed
    and kept. Without ``force`` a file that another process made meanwhile is not replaced either.

    Args:
        path: the file.
        data: its bytes, in one piece or in several, for what would not fit into memory twice.
        verify: called with the temporary file's path; what it raises stops the writing.
        force: replace an existing file.

    Raises:
        UsageError: it exists, and ``force`` is not set.
        ResourceError: folder, disk or permissions do not allow it.
    """
    parts = [memoryview(part).cast("B") for part in ([data] if isinstance(data, bytes) else data)]
    target = _target(path, force)
    _sweep(target.parent)
    _check_space(target, sum(map(len, parts)))
    descriptor, temporary = _create_beside(target)
    try:
        with _explained(target):
            try:
                for part in parts:
                    _write_all(descriptor, part)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        if verify is not None:
            verify(temporary)
        with _explained(target):
            _put(temporary, target, force)
            _sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _target(path: str | os.PathLike[str], force: bool) -> Path:
    """Follow links and check what is there."""
    with _explained(Path(path)):
        target = Path(os.path.realpath(path))
        try:
            mode = target.stat().st_mode
        except FileNotFoundError:
            return target
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise ResourceError(f"{path} is {kind}, expected the name of a file to write")
    if not force:
        raise UsageError(f"{path} exists: give another name, or --force (force=True) to replace it")
    return target


def _create_beside(target: Path) -> tuple[int, Path]:
    """Make a temporary file that nobody else has; a name that is taken, be it by a planted link, is left alone."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with _explained(target):
        for attempt in range(1, _ATTEMPTS + 1):
            temporary = target.parent / f".timm-compressor-{_MACHINE}-{os.getpid()}-{secrets.token_hex(8)}.tmp"
            try:
                return os.open(temporary, flags, 0o666), temporary  # the umask takes its part off
            except FileExistsError:
                if attempt == _ATTEMPTS:
                    raise
    raise AssertionError("the last attempt returns or raises")


def _write_all(descriptor: int, view: memoryview) -> None:
    while view:
        view = view[os.write(descriptor, view) :]


def _put(temporary: Path, target: Path, force: bool) -> None:
    """Give the temporary file its name: a rename replaces, a link refuses to."""
    if not force:
        try:
            os.link(temporary, target)
            return
        except FileExistsError as error:
            raise UsageError(f"{target} was made by another process meanwhile: kept as it is") from error
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise  # those four: a file system without hard links
    os.replace(temporary, target)


def _sync_folder(folder: Path) -> None:
    """Make the new name survive a power cut; a few file systems cannot, and say EINVAL."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _sweep(folder: Path) -> None:
    """Remove what writers that no longer run left in ``folder``."""
    with contextlib.suppress(OSError):
        sweep_locks(folder)
        for entry in os.listdir(folder):
            found = _TEMPORARY.fullmatch(entry)
            if found and not _runs(int(found[1])):
                (folder / entry).unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _check_space(target: Path, size: int) -> None:
    with _explained(target):
        status = os.statvfs(target.parent)
    free = status.f_bavail * status.f_frsize
    if free < size:
        raise ResourceError(f"{target} needs {size:,} bytes, but {free:,} are free in {target.parent}")


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Turn an OSError into one line on ``target``."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        if isinstance(error, FileNotFoundError):
            raise ResourceError(f"folder {target.parent} does not exist: make it first") from error
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        lacks = isinstance(error, OSError) and error.errno in _WITHOUT
        hint = "; this file system may lack what that takes: write to another one, then copy the file" if lacks else ""
        raise ResourceError(f"{target} cannot be written: {reason}{hint}") from error
