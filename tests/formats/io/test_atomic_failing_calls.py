"""Calls to the system that fail: the old file is whole each time, and nothing is left behind."""

from __future__ import annotations

import errno
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from compressor.formats.errors import ResourceError
from compressor.formats.io.atomic import write_atomically
from tests.formats.io.test_atomic import names


class Failing:
    """A system call that fails at its n-th use."""

    def __init__(self, call: str, nth: int) -> None:
        self.call, self.nth, self.count = getattr(os, call), nth, 0
        self.acts_first = call == "close"  # or the descriptor would leak

    def __call__(self, *args: object, **options: object) -> object:
        self.count += 1
        if self.count != self.nth:
            return self.call(*args, **options)
        if self.acts_first:
            self.call(*args, **options)
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("old", [b"", b"old"])
@pytest.mark.parametrize("call", ["open", "write", "fsync", "link", "replace", "statvfs", "close"])
def test_nth_call_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, old: bytes) -> None:
    """A call fails at its first, second, ... use until it was not used so often: the old file is whole each time."""
    path = tmp_path / "a"
    for nth in range(1, 20):
        path.write_bytes(old) if old else path.unlink(missing_ok=True)
        failing = Failing(call, nth)
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                write_atomically(path, b"new", force=bool(old))
            except ResourceError as error:
                assert "Input/output error" in str(error)  # noqa: PT017
        assert names(tmp_path) in (["a"], [])
        if failing.count < nth:
            assert path.read_bytes() == b"new"
            return
        # once the name is given only syncing the folder can fail: the new file is then there in full
        assert (path.read_bytes() if path.exists() else b"") in (old, b"new")
    pytest.fail("never succeeded")


@pytest.mark.parametrize(("force", "call"), [(False, "link"), (True, "replace")])
def test_the_file_is_on_disk_before_it_has_its_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool, call: str
) -> None:
    calls: list[str] = []
    sync, rename = os.fsync, getattr(os, call)

    def fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        calls.append("folder" if stat.S_ISDIR(status.st_mode) else f"{status.st_size} bytes")
        sync(descriptor)

    def named(old: Path, new: Path) -> None:
        calls.append(call)
        rename(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, call, named)
    write_atomically(tmp_path / "a", [b"ne", b"w"], force=force)
    assert calls == ["3 bytes", call, "folder"]


def test_calls_that_write_less_than_they_are_given_are_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:2]))
    write_atomically(tmp_path / "a", [b"abcde", b"", b"fg"])
    assert (tmp_path / "a").read_bytes() == b"abcdefg"


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_file_systems_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*paths: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    write_atomically(tmp_path / "a", b"new")
    assert names(tmp_path) == ["a"]


def test_file_systems_without_rename_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(ResourceError, match="Function not implemented"):
        write_atomically(tmp_path / "a", b"new")
    assert names(tmp_path) == []


def test_full_disk_is_told_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = os.statvfs(tmp_path)
    values = list(status)
    values[4] = 0  # f_bavail
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(values))
    with pytest.raises(ResourceError, match="needs 3 bytes, but 0 are free"):
        write_atomically(tmp_path / "a", b"new")
    assert names(tmp_path) == []


def test_file_size_limit(tmp_path: Path) -> None:
    """A real refusal of the kernel, in a child whose files may have 1,000 bytes."""
    code = (
        "import resource, signal, sys\n"
        "from compressor.formats.io.atomic import write_atomically\n"
        "from compressor.formats.errors import ResourceError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_atomically(sys.argv[1], bytes(5000))\n"
        "except ResourceError as error: print(error)"
    )
    assert resource.RLIMIT_FSIZE
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a"], capture_output=True, text=True, check=True)
    assert "cannot be written: File too large" in done.stdout
    assert names(tmp_path) == []
