"""Runs that cannot go on, or cannot begin, or cannot keep what they have: one line, and the exit code."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import filelock
import pytest
from safetensors.torch import save_file

from compressor.checkpointing.serialization import read_state, write_state
from compressor.cli.main import run
from compressor.models.baseline import create_model
from tests.faults.test_writing import refusing
from tests.helpers.runs import FOLDER, OUT, Runs, _here, kept, killed, runs, tell, weights
from tests.helpers.tiny import few_digits

__all__ = ["_here", "runs", "weights"]  # the fixtures


def test_resuming_with_another_recipe_seed_or_data(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(runs, 9)
    begin = "out.checkpoints holds another run: "
    end = ". Give the command as it was, or begin anew with --force"
    assert runs.refused(2, "--resume", "--seed", "1") == f"{begin}seed was 0, is 1{end}"
    assert runs.refused(2, "--resume", "--lr", "0.001") == f"{begin}recipe.stage 1.lr was 0.01, is 0.001{end}"
    said = runs.refused(2, "--resume", "--bits", "3", "--epochs", "3")
    assert said == f"{begin}recipe.stage 1.epochs was 4, is 3; recipe.stage 1.rule 1.codewords was 4, is 8{end}"
    other = replace(few_digits(), version="digits-2")
    with monkeypatch.context() as patch:
        patch.setattr("compressor.cli.setup.load_data", lambda *_, **__: other)
        assert runs.refused(2, "--resume") == f'{begin}data.version was "digits-1", is "digits-2"{end}'
    runs(0, "--resume")


def test_resuming_from_other_weights_under_the_same_name(runs: Runs, weights: Path) -> None:
    killed(runs, 9)
    save_file(create_model("tiny", {}, seed=1).state_dict(), "other.safetensors")
    runs.words = tuple("other.safetensors" if word == str(weights) else word for word in runs.words)
    said = runs.refused(2, "--resume")
    assert said.startswith("out.checkpoints holds another run: weights was ")


@pytest.mark.parametrize(
    ("where", "key", "said"),
    [
        (["subject", "model"], "weight_sharing.0.values", "Error(s) in loading state_dict for "),
        (["optimizer"], "param_groups", "no 'param_groups'"),
    ],
)
def test_resuming_a_checkpoint_of_another_version(runs: Runs, where: list[str], key: str, said: str) -> None:
    killed(runs, 9)
    newest = max(FOLDER.glob("*.safetensors"))
    state = read_state(newest)
    found = state["state"]["parts"]
    for name in where:
        found = found[name]
    del found[key]
    write_state(newest, state)
    line = runs.refused(2, "--resume")
    assert line.startswith(f"out.checkpoints holds what another version of this program has saved ({said}")
    assert line.endswith("). Go on with that one, or begin anew with --force")
    assert not OUT.exists()


def test_a_checkpoint_of_another_format(runs: Runs) -> None:
    killed(runs, 9)
    newest = max(FOLDER.glob("*.safetensors"))
    state = read_state(newest)
    del state["format"]  # as checkpoints were before it was noted
    write_state(newest, state)
    assert runs.refused(2, "--resume") == (
        "out.checkpoints holds what another version of this program has saved. Go on with that one, or begin anew with "
        "--force"
    )


@pytest.mark.parametrize("cut", [0, 7, 400, -1])
def test_the_newest_checkpoint_is_damaged(runs: Runs, caplog: pytest.LogCaptureFixture, cut: int) -> None:
    whole = runs.whole()
    killed(runs, 14)
    *_, older, newest = sorted(FOLDER.glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:cut])
    assert "Resuming stage 1 of 1 after step 6" in runs(0, "--resume")
    (warning,) = caplog.messages
    assert warning.startswith(f"{newest} is damaged, or holds no state of a training (")
    assert warning.endswith(f"): going back to {older.name}")
    assert "\n" not in warning
    assert OUT.read_bytes() == whole


def test_all_checkpoints_are_damaged(runs: Runs) -> None:
    killed(runs, 14)
    for path in FOLDER.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    said = runs.refused(3, "--resume")
    assert "(its checksum differs); no other is left: begin anew with --force" in said
    runs(0, "--force")


def test_nothing_to_resume(runs: Runs) -> None:
    line = "nothing to resume: no checkpoint in out.checkpoints; leave out --resume"
    assert runs.refused(4, "--resume") == line
    assert not FOLDER.exists()
    assert run(["tiny", "--checkpoint-path", "x", "--resume"]) == 2
    assert "no data to train on for --resume: name --dataset or --data-dir" in runs.capsys.readouterr().err


def test_a_run_that_has_ended_is_not_resumed(runs: Runs) -> None:
    OUT.write_bytes(b"the file of that run")
    said = runs.refused(4, "--resume")
    assert said.startswith(
        "nothing to resume: out is written and its run has ended, without --keep-checkpoints. Leave out --resume "
    )
    assert said.endswith("train on from its weights with --checkpoint-path out")
    assert "force" not in said, "which would throw the file away"
    assert not FOLDER.exists()


def test_an_interrupted_run_is_not_overwritten(runs: Runs) -> None:
    killed(runs, 9)
    line = "out.checkpoints holds a run that was interrupted: go on with --resume, or begin anew with --force"
    assert runs.refused(2) == line
    runs(0, "--force")
    assert not FOLDER.exists()


def test_another_process_is_at_work(runs: Runs) -> None:
    FOLDER.mkdir()
    with filelock.FileLock(FOLDER / ".lock"):
        line = "another process is at work in out.checkpoints: wait for it, or stop it first"
        assert runs.refused(6) == runs.refused(6, "--resume") == line
    assert kept() == [".lock"]


def test_a_file_is_in_the_way_of_the_folder(runs: Runs) -> None:
    FOLDER.touch()
    assert runs.refused(6) == "out.checkpoints cannot be written: File exists"


def test_the_disk_is_full(runs: Runs, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that need not stop goes on; one that is told to cannot be said to be kept."""
    whole = runs.whole()
    with monkeypatch.context() as patch:
        fill = patch.setattr
        runs(0, at=1, act=lambda: fill("compressor.checkpointing.manager.write_state", refused))
    assert OUT.read_bytes() == whole
    assert len(caplog.messages) == 4
    assert caplog.messages[0] == (
        "no checkpoint of step 6: out.checkpoints/01-0000000006.safetensors needs 3 bytes; the training goes on"
    )
    OUT.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refusing(28))
        said = runs(6, at=9, act=tell(signal.SIGTERM))
    assert "01-0000000010.safetensors cannot be written: No space left on device" in said.splitlines()[-1]
    assert not FOLDER.exists()


def refused(path: Path, state: object) -> None:
    from compressor.formats.errors import ResourceError

    raise ResourceError(f"{path} needs 3 bytes")


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--mixup", "-1"), "'--mixup': '-1', expected a number at least 0"),
        (("--cutmix", "inf"), "cutmix: expected a finite number, got inf"),
        (("--smoothing", "1"), "'--smoothing': '1', expected a number at least 0 and below 1"),
        (("--layer-decay", "0"), "'--layer-decay': '0', expected a number above 0 and at most 1"),
        (("--model-ema-decay", "1"), "'--model-ema-decay': '1', expected a number at least 0 and below 1"),
    ],
)
def test_shares_that_are_none(runs: Runs, option: tuple[str, str], said: str) -> None:
    assert said in runs.refused(2, *option)
