"""Atomic writing: a file appears complete or not at all, whatever happens in between."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import secrets
import shutil
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from compressor.formats.errors import ResourceError, UsageError
from compressor.formats.io.locking import sweep_locks

__all__ = ["check_not_input", "check_writable", "make_folder", "write_atomically", "write_folder_atomically"]

_ATTEMPTS = 3
_UNSUPPORTED = {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.ENOTSUP}  # of file systems without rename or fsync

# The name of a temporary file contains machine and process, so that the next writer can remove those of dead processes.
_MACHINE = f"{zlib.crc32(platform.node().encode()):08x}"
_TEMPORARY = re.compile(rf"\.timm-compressor-{_MACHINE}-(\d+)-[0-9a-f]{{16}}\.tmp")


def check_writable(path: str | os.PathLike[str], force: bool, folder: bool = False) -> None:
    """Checks, before long work, that a file can be written, by creating and removing a temporary file beside it.

    Args:
        path: the file that is to be written.
        force: whether it may exist.
        folder: whether it is to be a folder, for ``write_folder_atomically``; False, the default, for a file.

    Raises:
        UsageError: it exists and ``force`` is not set.
        ResourceError: it is not a regular file, or not a folder, or its folder does not exist or cannot be written.
    """
    target = _target(path, force, folder)
    descriptor, temporary = _create_beside(target)
    os.close(descriptor)
    temporary.unlink(missing_ok=True)


def check_not_input(path: str | os.PathLike[str], *inputs: str | os.PathLike[str]) -> None:
    """Checks that a file to be written is none of those that it is made from, which not even ``force`` replaces.

    Args:
        path: the file that is to be written.
        inputs: the files that are read.

    Raises:
        UsageError: it is one of them, by this name or another.
    """
    for each in inputs:
        with contextlib.suppress(OSError):  # a file that does not exist is not the other one
            if os.path.samefile(path, each):
                raise UsageError(f"{path} is the file that is read, and is never replaced: give another name")


def make_folder(folder: Path) -> None:
    """Makes a folder, where it is not there yet; raises ResourceError where none can be made."""
    if not folder.parent.is_dir():
        raise ResourceError(f"folder {folder.parent} does not exist: make it first")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as exc:
        raise ResourceError(f"folder {folder} cannot be made ({exc.strerror or exc})") from exc


def write_atomically(
    path: str | os.PathLike[str],
    data: bytes | Sequence[bytes | memoryview],
    verify: Callable[[Path], None] | None = None,
    force: bool = False,
) -> None:
    """Writes a temporary file beside ``path``, verifies it and renames it.

    On return the file is on disk under its name. After an error the old file, if there was one, is unchanged, and no
    temporary file remains; those of killed processes are removed by the next call for the same folder. A symbolic link
    is followed and kept. Without ``force``, a file that another process creates in the meantime is not replaced either.

    Args:
        path: the file.
        data: its bytes, in one piece, or in several so that large data need not be in memory twice.
        verify: a function that is called with the path of the temporary file, and raises an error where it is wrong;
            None, the default, for no check.
        force: whether an existing file is replaced; by default it is an error.

    Raises:
        UsageError: the file exists and ``force`` is not set.
        ResourceError: the folder does not exist, or disk space or permissions do not suffice.
    """
    pieces = [memoryview(piece).cast("B") for piece in ([data] if isinstance(data, bytes) else data)]
    target = _target(path, force)
    _remove_stale(target.parent)
    _check_space(target, sum(map(len, pieces)))
    descriptor, temporary = _create_beside(target)
    try:
        with _resource_errors(target):
            try:
                for piece in pieces:
                    _write_all(descriptor, piece)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        if verify is not None:
            verify(temporary)
        with _resource_errors(target):
            _rename(temporary, target, force)
            _sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_folder_atomically(
    path: str | os.PathLike[str],
    files: Mapping[str, bytes],
    verify: Callable[[Path], None],
    force: bool = False,
) -> None:
    """Writes a temporary folder beside ``path``, verifies it and renames it.

    As ``write_atomically``; a folder that is replaced is away for as long as it takes to rename another.

    Args:
        path: the folder.
        files: the bytes of its files, by their paths in it.
        verify: a function that is called with the path of the temporary folder, and raises an error where it is wrong.
        force: whether an existing folder is replaced, with all that is in it; by default it is an error.

    Raises:
        UsageError: the folder exists and ``force`` is not set.
        ResourceError: the folder around it does not exist, or disk space or permissions do not suffice.
    """
    target = _target(path, force, folder=True)
    _remove_stale(target.parent)
    _check_space(target, sum(map(len, files.values())))
    temporary = target.parent / _temporary_name()
    try:
        with _resource_errors(target):
            for name, data in files.items():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                with open(temporary / name, "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
        verify(temporary)
        with _resource_errors(target):
            _rename_folder(temporary, target, force)
            _sync_folder(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename_folder(temporary: Path, target: Path, force: bool) -> None:
    """Gives a folder its name; what had it is moved away, and removed only after that, or moved back."""
    if not force or not target.exists():
        try:
            os.rename(temporary, target)  # which replaces an empty folder, and no other
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise UsageError(f"{target} was created by another process in the meantime: left unchanged") from error
            raise
        return
    old = target.parent / _temporary_name()
    os.rename(target, old)
    try:
        os.rename(temporary, target)
    except OSError:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _target(path: str | os.PathLike[str], force: bool, folder: bool = False) -> Path:
    """Returns the path after following links, and checks that a file, or a folder, may be written there."""
    with _resource_errors(Path(path)):
        target = Path(os.path.realpath(path))
        try:
            mode = target.stat().st_mode
        except FileNotFoundError:
            return target
    if not (stat.S_ISDIR if folder else stat.S_ISREG)(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a file" if stat.S_ISREG(mode) else "not a regular file"
        raise ResourceError(f"{path} is {kind}, expected the name of a {'folder' if folder else 'file'} to write")
    if not force:
        raise UsageError(f"{path} exists: give another name, or --force (force=True) to replace it")
    return target


def _temporary_name() -> str:
    return f".timm-compressor-{_MACHINE}-{os.getpid()}-{secrets.token_hex(8)}.tmp"


def _create_beside(target: Path) -> tuple[int, Path]:
    """Creates a new temporary file in the folder of a file; never opens an existing file or link of that name."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with _resource_errors(target):
        for attempt in range(1, _ATTEMPTS + 1):
            temporary = target.parent / _temporary_name()
            try:
                return os.open(temporary, flags, 0o666), temporary  # less the bits of the umask
            except FileExistsError:
                if attempt == _ATTEMPTS:
                    raise
    raise AssertionError("the last attempt returns or raises")


def _write_all(descriptor: int, view: memoryview) -> None:
    while view:
        view = view[os.write(descriptor, view) :]


def _rename(temporary: Path, target: Path, force: bool) -> None:
    """Gives the temporary file its name: by a rename, which replaces a file, or by a hard link, which never does."""
    if not force:
        try:
            os.link(temporary, target)
            return
        except FileExistsError as error:
            raise UsageError(f"{target} was created by another process in the meantime: left unchanged") from error
        except OSError as error:  # the four errors of file systems without hard links
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
    os.replace(temporary, target)


def _sync_folder(folder: Path) -> None:
    """Writes the entries of a folder to disk, so that a new name survives a power cut, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _remove_stale(folder: Path) -> None:
    """Removes the temporary files and locks that processes which no longer run have left in a folder."""
    with contextlib.suppress(OSError):
        sweep_locks(folder)
        for entry in os.listdir(folder):
            match = _TEMPORARY.fullmatch(entry)
            if match and not _is_running(int(match[1])):
                stale = folder / entry
                shutil.rmtree(stale) if stale.is_dir() and not stale.is_symlink() else stale.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _check_space(target: Path, size: int) -> None:
    """Raises ResourceError where the disk of a file has less than ``size`` bytes free."""
    with _resource_errors(target):
        status = os.statvfs(target.parent)
    free = status.f_bavail * status.f_frsize
    if free < size:
        raise ResourceError(f"{target} needs {size:,} bytes, but {free:,} are free in {target.parent}")


@contextlib.contextmanager
def _resource_errors(target: Path) -> Iterator[None]:
    """Raises ResourceError with a message of one line, which names ``target``, in place of an OSError."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        if isinstance(error, FileNotFoundError) and not target.parent.is_dir():  # /proc exists, and takes no files
            raise ResourceError(f"folder {target.parent} does not exist: make it first") from error
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        unsupported = isinstance(error, OSError) and error.errno in _UNSUPPORTED
        hint = "; this file system may not support it: write to another one, then copy the file" if unsupported else ""
        raise ResourceError(f"{target} cannot be written: {reason}{hint}") from error
