"""Disks, folders, names and other processes in the way of a file to write, or of one that is read, as a user meets it.

How a file is put in place is tested call by call in tests/formats/io/test_atomic*.py; here through the commands.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from compressor.cli.main import run
from compressor.formats.errors import ResourceError
from compressor.formats.file.reader import PackedFile
from compressor.formats.file.writer import pack, write
from compressor.formats.io.atomic import write_atomically
from tests.faults.test_damaged_files import Says, says
from tests.formats.io.test_locking import another_process
from tests.formats.test_content import RECORDS
from tests.helpers.forging import small

__all__ = ["says"]  # the fixture

UNPACK = ("unpack", "good.safetensors", "-o", "a.safetensors")
PACK = ("pack", "test_resnet", "--checkpoint-path", "dense.safetensors", "--scheme", "kmeans", "--bits", "1")
ELSEWHERE = "this file system may not support it: write to another one, then copy the file"
COMMANDS = {"unpack": UNPACK, "pack": (*PACK, "-o", "a.safetensors")}


@pytest.fixture
def old(says: Says) -> Path:
    """Returns a file that is in the way, beside what the commands need."""
    del says  # it has changed the folder
    Path("good.safetensors").write_bytes(small())
    save_file(timm.create_model("test_resnet").state_dict(), "dense.safetensors")
    path = Path("a.safetensors")
    path.write_bytes(b"old")
    return path


def fails(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    """Returns the last line of a command that must fail, after those that tell how far it came."""
    assert run(list(words)) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    *progress, line = err.splitlines()
    assert not [said for said in progress if "rror" in said]
    assert line.startswith("error: ")
    return line


def refusing(code: int) -> Callable[..., Any]:
    def refuse(*_: object, **__: object) -> Any:
        raise OSError(code, os.strerror(code))

    return refuse


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("call", "code", "text"),
    [
        ("write", errno.ENOSPC, "cannot be written: No space left on device"),  # 59
        ("write", errno.EDQUOT, "cannot be written: Disk quota exceeded"),
        ("write", errno.EFBIG, "cannot be written: File too large"),
        ("fsync", errno.EIO, "cannot be written: Input/output error"),
        ("fsync", errno.EINVAL, f"cannot be written: Invalid argument; {ELSEWHERE}"),  # 75
        ("replace", errno.ENOSYS, f"cannot be written: Function not implemented; {ELSEWHERE}"),
        ("replace", errno.EXDEV, f"cannot be written: Invalid cross-device link; {ELSEWHERE}"),
    ],
)
def test_the_file_system_refuses(
    old: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, command: str, call: str, code: int, text: str
) -> None:
    before = sorted(os.listdir())
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refusing(code))
        assert fails(capsys, 6, *COMMANDS[command], "--force").endswith(text)
    assert old.read_bytes() == b"old"
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_names_bytes_needed_and_free(
    old: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    values = list(os.statvfs("."))
    values[4] = 0  # f_bavail
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(values))
    assert " bytes, but 0 are free in " in fails(capsys, 6, *COMMANDS[command], "--force")
    assert old.read_bytes() == b"old"


@pytest.mark.parametrize("command", COMMANDS)
def test_output_is_checked_before_the_work(
    old: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr("compressor.cli.weights.create_model", forbidden)
    monkeypatch.setattr("compressor.formats.loader.load_state_dict", forbidden)
    words = COMMANDS[command][:-1]
    assert "exists: give another name, or --force" in fails(capsys, 2, *words, old.name)
    Path("folder.safetensors").mkdir()
    assert "is a folder, expected the name of a file" in fails(capsys, 6, *words, "folder.safetensors", "--force")
    assert "folder" in fails(capsys, 6, *words, "none/a.safetensors")
    monkeypatch.setattr("compressor.formats.io.atomic.os.open", refusing(errno.EACCES))
    assert "cannot be written: Permission denied" in fails(capsys, 6, *words, "new.safetensors")
    monkeypatch.setattr("compressor.formats.io.atomic.os.open", refusing(errno.EROFS))
    assert "cannot be written: Read-only file system" in fails(capsys, 6, *words, "new.safetensors")
    assert old.read_bytes() == b"old"


@pytest.mark.parametrize("force", [False, True])
def test_written_files_survive_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool) -> None:
    """The bytes are on the disk before the file has its name, and the name before anyone is told of it."""
    calls: list[str] = []
    for name in ("fsync", "link", "replace"):
        real = getattr(os, name)

        def noted(*given: Any, name: str = name, real: Any = real) -> Any:
            at = os.readlink(f"/proc/self/fd/{given[0]}") if name == "fsync" else ""
            calls.append(f"{name} {'folder' if at == str(tmp_path) else 'file'}" if at else name)
            return real(*given)

        monkeypatch.setattr(os, name, noted)
    write_atomically(tmp_path / "a", b"new", force=force)
    assert calls == ["fsync file", "replace" if force else "link", "fsync folder"]


def test_a_link_stays_a_link(old: Path) -> None:
    Path("link.safetensors").symlink_to(old)
    assert run([*UNPACK[:-1], "link.safetensors", "--force"]) == 0
    assert Path("link.safetensors").is_symlink()
    assert old.read_bytes() != b"old"


def test_two_writers_and_a_reader(tmp_path: Path) -> None:
    """Each reader sees one file or the other in full; a writer without force never replaces the other's."""
    contents = [RECORDS["flat_blocks"](), RECORDS["tied_tensors"]()]
    possible = {pack(content) for content in contents}
    path = tmp_path / "a"
    write(path, contents[0])

    def replace(number: int) -> None:
        for _ in range(10):
            write(path, contents[number], force=True)

    threads = [threading.Thread(target=replace, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert path.read_bytes() in possible
        with PackedFile.open(path) as file:
            assert file.check() == []
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_second_of_two_commands_is_refused_before_the_work(
    old: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the work began")

    before = sorted(os.listdir())
    with another_process(old.resolve()), monkeypatch.context() as patch:
        patch.setattr("compressor.cli.weights.create_model", forbidden)
        patch.setattr("compressor.formats.loader.load_state_dict", forbidden)
        assert f"{old.name} is going to be written by another process: wait" in fails(
            capsys, 6, *COMMANDS[command], "--force"
        )
    assert old.read_bytes() == b"old"
    assert run([*COMMANDS[command], "--force"]) == 0  # the other one was killed
    assert old.read_bytes() != b"old"
    assert sorted(os.listdir()) == before


NAMES = ["a b", "-x", "CON", "日本語", os.fsdecode(b"not-\xff-utf8"), "x" * 230]


EACH = """
import sys
from compressor.cli.main import main
for words in (["verify", "--"], ["inspect", "--"], ["inspect", "--json", "--"], ["diff", "--", sys.argv[1]]):
    try:
        main([*words, sys.argv[1]])
    except SystemExit as end:
        assert end.code == 0, end.code
"""


@pytest.mark.parametrize("name", NAMES)
def test_any_file_name(says: Says, name: str) -> None:
    del says
    path = f"{name}.safetensors"
    write(path, RECORDS["flat_blocks"]())
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}  # as a terminal's is, but for C and POSIX
    done = subprocess.run([sys.executable, "-c", EACH, path], capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert run(["unpack", "-o", "out.safetensors", "--", path]) == 0


@pytest.mark.parametrize("path", ["x" * 300, "a/" * 3000 + "x"])
def test_impossible_file_names(says: Says, path: str) -> None:
    Path("good.safetensors").write_bytes(small())
    assert "cannot be opened" in says(6, "verify", path)
    assert "cannot be written" in says(6, "unpack", "good.safetensors", "-o", f"{path}.safetensors")
    with pytest.raises(ResourceError, match="cannot be opened"):
        PackedFile.open("a\0b")


@pytest.mark.parametrize(
    "environment",
    [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"LC_ALL": "de_DE.UTF-8", "LANG": "tr_TR"}, {}],
)
def test_any_locale(says: Says, environment: dict[str, str]) -> None:
    del says
    Path("ü.safetensors").write_bytes(small())
    code = "from compressor.cli.main import main; main()"
    for words in (["verify"], ["inspect"]):
        command = [sys.executable, "-c", code, *words, "ü.safetensors"]
        done = subprocess.run(command, capture_output=True, env={**os.environ, **environment})
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"1,5" not in done.stdout


def test_the_clock_does_not_matter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = RECORDS["flat_blocks"]()
    before = pack(content)
    monkeypatch.setattr(time, "time", lambda: -1e9)
    assert write(tmp_path / "a", content) == len(before)
    assert (tmp_path / "a").read_bytes() == before


def test_a_file_swapped_between_check_and_use(tmp_path: Path) -> None:
    """One descriptor, opened once: what was checked is what is read."""
    path = tmp_path / "a"
    path.write_bytes(small())
    with PackedFile.open(path) as file:
        wanted = file.tensor("fc.weight")
        os.replace(path, tmp_path / "moved")
        path.write_bytes(b"another")
        assert file.check() == []
        assert torch.equal(torch.from_numpy(file.tensor("fc.weight")), torch.from_numpy(wanted))
