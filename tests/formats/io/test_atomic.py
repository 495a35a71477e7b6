"""A file is put in place whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from compressor.formats.errors import CompressorError, IntegrityError, ResourceError, UsageError
from compressor.formats.io import atomic
from compressor.formats.io.atomic import check_writable, write_atomically


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_new_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0, 0o666)])
def test_mode_is_by_the_umask(tmp_path: Path, mask: int, mode: int) -> None:
    old = os.umask(mask)
    try:
        write_atomically(tmp_path / "a", b"new")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


@pytest.mark.parametrize("act", [check_writable, lambda path, force: write_atomically(path, b"new", force=force)])
def test_existing_file_needs_force(tmp_path: Path, act: Callable[[Path, bool], None]) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(UsageError, match=r"a exists: .*--force") as caught:
        act(path, False)
    assert caught.value.exit_code == 2
    assert path.read_bytes() == b"old"
    act(path, True)
    assert names(tmp_path) == ["a"]


def test_check_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "a", False)
    assert names(tmp_path) == []


@pytest.mark.parametrize("act", [check_writable, lambda path, force: write_atomically(path, b"new", force=force)])
@pytest.mark.parametrize(
    ("target", "text"),
    [("absent/a", "does not exist: make it first"), (".", "is a folder"), ("fifo", "not a regular file"),
     ("file/a", "cannot be written: Not a directory"), ("x" * 300, "File name too long"), ("loop", "cannot be written"),
     ("a\0b", "cannot be written")],
)  # fmt: skip
def test_targets_that_cannot_be(tmp_path: Path, act: Callable[[Path, bool], None], target: str, text: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    before = names(tmp_path)
    with pytest.raises(ResourceError, match=text) as caught:
        act(tmp_path / target, True)
    assert caught.value.exit_code == 6
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == before


def test_read_only_folder_is_told_before_the_work(tmp_path: Path) -> None:
    """In a child that is not root, since root may write anywhere."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    os.chmod(tmp_path, 0o755)
    code = (
        "import os, sys\n"
        "from compressor.formats.io.atomic import check_writable\n"
        "from compressor.formats.errors import ResourceError\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "try: check_writable(sys.argv[1], False)\n"
        "except ResourceError as error: print(error)"
    )
    path = folder / "a"
    for parent in tmp_path.parents[:3]:
        if os.stat(parent).st_uid == os.getuid() and parent.name.startswith("pytest"):
            os.chmod(parent, 0o755)
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert "cannot be written: Permission denied" in done.stdout


def test_link_is_kept_and_its_target_replaced(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("deep/real")
    write_atomically(tmp_path / "link", b"new", force=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "deep" / "real").read_bytes() == b"new"


def test_dangling_link_gets_its_target(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_failed_verification_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")

    def verify(path: Path) -> None:
        assert path.read_bytes() == b"new"
        raise IntegrityError("no good")

    with pytest.raises(IntegrityError):
        write_atomically(tmp_path / "a", b"new", verify, force=True)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_interrupted_verification_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def verify(path: Path) -> None:
        raise error

    with pytest.raises(error):
        write_atomically(tmp_path / "a", b"new", verify)
    assert names(tmp_path) == []


def test_file_made_meanwhile_is_kept(tmp_path: Path) -> None:
    def verify(path: Path) -> None:
        (tmp_path / "a").write_bytes(b"of another process")

    with pytest.raises(UsageError, match="created by another process"):
        write_atomically(tmp_path / "a", b"new", verify)
    assert (tmp_path / "a").read_bytes() == b"of another process"
    assert names(tmp_path) == ["a"]


def test_a_planted_temporary_link_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "victim").write_bytes(b"victim")
    drawn = iter(digit * 16 for digit in "01000")
    monkeypatch.setattr(secrets, "token_hex", lambda size: next(drawn))
    planted = tmp_path / f".timm-compressor-{atomic._MACHINE}-{os.getpid()}-{'0' * 16}.tmp"
    planted.symlink_to("victim")
    write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    with pytest.raises(ResourceError, match="File exists"):
        write_atomically(tmp_path / "b", b"new")
    assert next(drawn, None) is None  # three names were tried
    assert (tmp_path / "victim").read_bytes() == b"victim"
    assert planted.is_symlink()
    assert names(tmp_path) == [planted.name, "a", "victim"]


def test_litter_of_the_dead_is_swept_and_of_the_living_kept(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    dead = f".timm-compressor-{atomic._MACHINE}-{child.pid}-{'a' * 16}.tmp"
    living = f".timm-compressor-{atomic._MACHINE}-{os.getpid()}-{'b' * 16}.tmp"
    elsewhere = f".timm-compressor-00000000-{child.pid}-{'c' * 16}.tmp"
    for name in (dead, living, elsewhere, "other.tmp"):
        (tmp_path / name).touch()
    write_atomically(tmp_path / "a", b"new")
    assert names(tmp_path) == sorted([living, elsewhere, "other.tmp", "a"])


def test_two_writers_never_mix(tmp_path: Path) -> None:
    path = tmp_path / "a"
    errors: list[CompressorError] = []

    def writer(letter: bytes) -> None:
        for _ in range(20):
            try:
                write_atomically(path, letter * 100_000, force=True)
            except CompressorError as error:
                errors.append(error)

    threads = [threading.Thread(target=writer, args=(letter,)) for letter in (b"x", b"y")]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            assert len(set(path.read_bytes())) == 1
    assert not errors
    assert names(tmp_path) == ["a"]


def test_a_folder_that_is_there_and_takes_no_files() -> None:
    with pytest.raises(ResourceError, match=r"^/proc/none cannot be written: "):
        check_writable("/proc/none", force=False)
