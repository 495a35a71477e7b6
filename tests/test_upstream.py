"""Defects of the packages we stand on, each still there.

A test that fails tells that its defect is gone, and its docstring what we do because of it, which may then go.
Others of the kind stand beside what they guard: metadata order and file modes of safetensors in test_packed_file,
codes of any length in test_codec_huffman.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import timm.data
import torch
from bitarray import bitarray
from bitarray.util import canonical_decode
from PIL import Image
from timm.utils.checkpoint_saver import CheckpointSaver


def test_safetensors_still_scrambles_fortran_order() -> None:
    """And so ruff bans ``safetensors.numpy.save``; when it fails, the ban in pyproject may go."""
    array = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    read = safetensors.numpy.load(safetensors.numpy.save({"a": array}))["a"]  # noqa: TID251
    assert not np.array_equal(read, array)


def test_safetensors_still_cannot_read_a_tensor_called_metadata() -> None:
    """And so the name is refused; when it fails, ``fields.parse_name`` need not, nor ``SPEC.md``."""
    data = safetensors.torch.save({"__metadata__": torch.zeros(1)})
    with pytest.raises(safetensors.SafetensorError):
        safetensors.torch.load(data)


def test_safetensors_still_replaces_a_link(tmp_path: Path) -> None:
    """And so all files are written by ``atomic.write_atomically``; when it fails, one reason less."""
    (tmp_path / "link").symlink_to("file")
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "link")
    assert not (tmp_path / "link").is_symlink()


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace to see system calls")
def test_safetensors_still_does_not_wait_for_the_disk(tmp_path: Path) -> None:
    """And so all files are written by ``atomic.write_atomically``; when it fails, one reason less."""
    code = "import numpy as np, safetensors.numpy as s; s.save_file({'a': np.zeros(3)}, 'a')"
    command = ["strace", "-f", "-e", "trace=rename,renameat,renameat2,fsync,fdatasync,sync_file_range,syncfs"]
    done = subprocess.run([*command, sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    if "rename" not in done.stderr:
        pytest.skip("strace may not look into a process here")
    assert "sync" not in done.stderr


def test_bitarray_still_decodes_codes_that_are_none() -> None:
    """Over-subscribed ones too; and so ``huffman`` checks Kraft's sum. When it fails, that check may go."""
    two_of_one_bit_and_one_of_two = [0, 2, 1]
    assert list(canonical_decode(bitarray("01001"), two_of_one_bit_and_one_of_two, [0, 1, 2])) == [0, 1, 0, 0, 1]


def test_bitarray_still_decodes_padding() -> None:
    """And so ``huffman`` decodes by a count and checks the rest; when it fails, bitarray might decode small files."""
    codes = bitarray("00011011")
    assert list(canonical_decode(codes + bitarray("00"), [0, 0, 4], [0, 1, 2, 3])) == [0, 1, 2, 3, 0]


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_timm_still_shows_another_picture_for_a_broken_one(tmp_path: Path) -> None:
    """And so ``splits`` reads pictures itself and names what is broken; when it fails, timm's own set will do."""
    (tmp_path / "cat").mkdir()
    Image.fromarray(np.full((4, 4, 3), 200, np.uint8)).save(tmp_path / "cat" / "1.png")
    (tmp_path / "cat" / "0.png").write_bytes(b"\x89PNG and no more")
    picture, _ = timm.data.ImageDataset(str(tmp_path))[0]  # type: ignore[no-untyped-call] # it leaves files open
    assert np.asarray(picture).min() == 200


def test_timm_still_recovers_the_oldest(tmp_path: Path) -> None:
    """And so we look for the newest checkpoint ourselves; when it fails, ``find_recovery`` will do."""
    saver = CheckpointSaver.__new__(CheckpointSaver)
    saver.recovery_dir, saver.recovery_prefix, saver.extension = str(tmp_path), "recovery", ".pth.tar"
    for batch in (200, 300):
        (tmp_path / f"recovery-0-{batch}.pth.tar").touch()
    found = saver.find_recovery()  # type: ignore[no-untyped-call]
    assert found == str(tmp_path / "recovery-0-200.pth.tar")


def test_click_still_ends_an_interrupted_command_with_1() -> None:
    """And so ``cli.main.run`` gives the code itself, 130; when it fails, click's own will do."""

    @click.command()
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        interrupted.main([])
    assert caught.value.code == 1
