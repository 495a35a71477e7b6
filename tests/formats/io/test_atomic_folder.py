"""A folder is put in place whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from compressor.formats.errors import IntegrityError, ResourceError, UsageError
from compressor.formats.io.atomic import check_writable, write_atomically, write_folder_atomically

FILES = {"top": b"1", "a/b/deep": b"22"}


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def accept(folder: Path) -> None:
    assert tree(folder) == FILES


def test_a_new_folder_is_verified_before_it_has_its_name(tmp_path: Path) -> None:
    def verify(folder: Path) -> None:
        accept(folder)
        assert not (tmp_path / "net").exists()

    write_folder_atomically(tmp_path / "net", FILES, verify)
    assert tree(tmp_path) == {f"net/{name}": data for name, data in FILES.items()}


def test_an_existing_folder_needs_force_and_is_replaced_with_all_that_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "old").write_text("mine")
    for act in (check_writable, lambda path, force, folder: write_folder_atomically(path, FILES, accept, force)):
        with pytest.raises(UsageError, match=r"net exists: .*--force"):
            act(tmp_path / "net", False, True)
    assert tree(tmp_path) == {"net/old": b"mine"}
    check_writable(tmp_path / "net", True, folder=True)
    write_folder_atomically(tmp_path / "net", FILES, accept, force=True)
    assert tree(tmp_path) == {f"net/{name}": data for name, data in FILES.items()}
    assert os.listdir(tmp_path) == ["net"]


@pytest.mark.parametrize("force", [False, True])
def test_what_is_wrong_is_not_there_and_leaves_what_was(tmp_path: Path, force: bool) -> None:
    def refuse(folder: Path) -> None:
        raise IntegrityError("wrong")

    if force:
        write_folder_atomically(tmp_path / "net", FILES, accept)
    with pytest.raises(IntegrityError):
        write_folder_atomically(tmp_path / "net", {"other": b""}, refuse, force)
    assert os.listdir(tmp_path) == (["net"] if force else [])
    assert not force or tree(tmp_path / "net") == FILES


def test_a_file_is_not_replaced_by_a_folder_nor_a_folder_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ResourceError, match=r"file is a file, expected the name of a folder"):
        write_folder_atomically(tmp_path / "file", FILES, accept, force=True)
    with pytest.raises(ResourceError, match=r"folder is a folder, expected the name of a file"):
        write_atomically(tmp_path / "folder", b"", force=True)
    with pytest.raises(ResourceError, match="does not exist"):
        write_folder_atomically(tmp_path / "no" / "net", FILES, accept)


def test_another_folder_of_the_name_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    def verify(folder: Path) -> None:
        (tmp_path / "net").mkdir()
        (tmp_path / "net" / "theirs").write_text("theirs")

    with pytest.raises(UsageError, match="created by another process"):
        write_folder_atomically(tmp_path / "net", FILES, verify)
    assert tree(tmp_path) == {"net/theirs": b"theirs"}


def test_what_a_killed_process_leaves_goes_with_the_next_write(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path\n"
        "from compressor.formats.io.atomic import write_folder_atomically\n"
        "write_folder_atomically(Path(sys.argv[1], 'net'), {'a/b': b'1'}, lambda folder: os._exit(9))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 9
    assert len(os.listdir(tmp_path)) == 1
    write_atomically(tmp_path / "file", b"1")
    assert os.listdir(tmp_path) == ["file"]
