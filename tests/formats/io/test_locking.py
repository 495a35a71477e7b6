"""A file that one process is going to write is kept from others, and no lock outlives its holder."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from compressor.formats.errors import ResourceError
from compressor.formats.io.atomic import write_atomically
from compressor.formats.io.locking import holding

CODE = """
import sys
from compressor.formats.io.locking import holding
with holding(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process(path: Path) -> Iterator[None]:
    """Hold a file in a child within the block, which then is killed."""
    command = [sys.executable, "-c", CODE, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        yield
        child.kill()


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_another_process_is_refused_in_one_line(tmp_path: Path) -> None:
    path, link = tmp_path / "a", tmp_path / "link"
    link.symlink_to("a")
    with another_process(path):
        for one in (path, link, tmp_path / "." / "a"):
            with pytest.raises(ResourceError, match="written by another process: wait") as caught, holding(one):
                pytest.fail("two hold it")
            assert caught.value.exit_code == 6
            assert "\n" not in str(caught.value)
        with holding(tmp_path / "b"):
            pass
    with holding(path):  # what a killed process held is free
        assert len(names(tmp_path)) == 2
    assert names(tmp_path) == ["link"]


def test_those_that_share_a_file_keep_others_out_until_the_last_has_left(tmp_path: Path) -> None:
    path = tmp_path / "a"

    def assert_kept() -> None:
        with pytest.raises(ResourceError), holding(path):
            pytest.fail("one holds what others share")

    with holding(path, shared=True):
        with holding(path, shared=True):
            assert_kept()
        assert_kept()
    assert names(tmp_path) == []
    with holding(path), pytest.raises(ResourceError), holding(path, shared=True):
        pytest.fail("one shares what another holds")


def test_what_fails_within_lets_go(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), holding(tmp_path / "a"):
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_locks_of_the_dead_are_swept_and_of_the_living_kept(tmp_path: Path) -> None:
    with another_process(tmp_path / "a"):
        (lock,) = names(tmp_path)
        write_atomically(tmp_path / "b", b"new")
        assert names(tmp_path) == [lock, "b"]
    assert names(tmp_path) == [lock, "b"]
    write_atomically(tmp_path / "c", b"new")
    assert names(tmp_path) == ["b", "c"]


def test_a_lock_removed_while_it_was_opened_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, inodes = fcntl.flock, []

    def flock(descriptor: int, operation: int) -> None:
        inodes.append(os.fstat(descriptor).st_ino)
        if len(inodes) == 1:
            (lock,) = tmp_path.iterdir()
            lock.rename(tmp_path / "kept")  # so that its inode is not used again
            (tmp_path / "kept").unlink()
        plain(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with holding(tmp_path / "a"):
        assert len(inodes) == 2
        assert next(tmp_path.iterdir()).stat().st_ino == inodes[1]
    assert names(tmp_path) == []


@pytest.mark.parametrize("call", ["open", "flock"])
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EACCES, errno.EROFS])
def test_where_nothing_can_be_held_the_work_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    opened = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(os if call == "open" else fcntl, call, refuse)
        with holding(tmp_path / "a"):
            pass
    assert len(os.listdir("/proc/self/fd")) == opened
    write_atomically(tmp_path / "b", b"new")
    assert names(tmp_path) == ["b"]


def test_where_python_has_no_such_locks_the_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with holding(tmp_path / "a"):
        write_atomically(tmp_path / "a", b"new")
    assert names(tmp_path) == ["a"]
