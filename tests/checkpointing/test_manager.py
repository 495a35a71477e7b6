"""The folder of checkpoints: which files it keeps, whom it refuses, and what it goes back to."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from compressor.checkpointing.manager import Checkpoints
from compressor.formats.errors import IntegrityError, MissingError, ResourceError, UsageError

FIRST, SECOND, THIRD = (f"00-000000000{step}.safetensors" for step in (1, 2, 3))


def saved(folder: Path, *steps: int) -> None:
    """Leaves what an interrupted run leaves, the state of each step its number."""
    checkpoints = Checkpoints(folder)
    for step in steps:
        checkpoints.save(step, {"step": step}, {"lr": 0.1})
    checkpoints.close()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3)
    assert names(tmp_path) == [SECOND, THIRD]


def test_one_that_is_named_is_kept_besides(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c")
    for step in (1, 2, 3):
        checkpoints.save(step, {}, {}, keep=1)
    assert [path.name for path in checkpoints.paths()] == [FIRST, SECOND, THIRD]
    checkpoints.clear()
    assert not (tmp_path / "c").exists()


def test_later_ones_are_deleted_after_a_rollback(tmp_path: Path) -> None:
    saved(tmp_path, 1, 3)
    checkpoints = Checkpoints(tmp_path, resume=True)
    assert checkpoints.back_to(2) == {"step": 1}
    checkpoints.save(2, {"step": 2}, {"lr": 0.1})
    assert [path.name for path in checkpoints.paths()] == [FIRST, SECOND]
    checkpoints.close()


def test_a_damaged_one_is_gone_back_from(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path, 1, 2)
    damage(tmp_path / SECOND)
    with caplog.at_level(logging.WARNING):
        checkpoints = Checkpoints(tmp_path, resume=True)
    (warning,) = caplog.messages
    assert warning.startswith(f"{tmp_path / SECOND} is damaged, or holds no state of a training (")
    assert warning.endswith(f"): going back to {FIRST}")
    assert checkpoints.found == (0, 1)
    assert checkpoints.take({"lr": 0.1}) == {"step": 1}
    checkpoints.close()
    assert names(tmp_path) == [FIRST]
    damage(tmp_path / FIRST)
    with pytest.raises(IntegrityError, match=r"; no other is left: begin anew with --force \(force=True\)$"):
        Checkpoints(tmp_path, resume=True)


def test_a_changed_training_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    checkpoints = Checkpoints(tmp_path, resume=True)
    with pytest.raises(UsageError, match=r" holds another run: lr was 0\.1, is 0\.2\. Give the command as it was"):
        checkpoints.take({"lr": 0.2})
    checkpoints.close()


def test_an_interrupted_run_is_only_replaced_by_force(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    with pytest.raises(UsageError, match=r" holds a run that was interrupted: go on with --resume \(resume=True\)"):
        Checkpoints(tmp_path)
    assert names(tmp_path) == [FIRST]
    Checkpoints(tmp_path, force=True).close()
    assert not tmp_path.exists()
    with pytest.raises(MissingError, match="nothing to resume: no checkpoint in "):
        Checkpoints(tmp_path, resume=True)


def test_a_folder_is_of_one_process_at_a_time(tmp_path: Path) -> None:
    first = Checkpoints(tmp_path)
    with pytest.raises(ResourceError, match=f"another process is at work in {tmp_path}: wait for it, or stop it first"):
        Checkpoints(tmp_path)
    first.save(1, {}, {})
    first.close()
    Checkpoints(tmp_path, resume=True).clear()
