"""Runs that are killed anywhere, or diverge, and go on: exit code, message, and the bytes of the file."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.checkpointing.serialization import read_state
from compressor.compressor import Compressor
from compressor.formats.file.reader import PackedFile
from tests.helpers.runs import FOLDER, OUT, STEPS, TINY, GoneError, Runs, _here, die, kept, killed, runs, tell, weights

__all__ = ["_here", "runs", "weights"]  # the fixtures


@pytest.mark.slow
def test_killed_again_and_again(runs: Runs) -> None:
    """Between checkpoints, at the end of an epoch, and after the last step; by number of steps, too."""
    whole = runs.whole()
    killed(runs, 5, "--checkpoint-steps", "2")
    for step, more in ((6, ("--checkpoint-steps", "1")), (15, ()), (18, ()), (STEPS, ())):
        killed(runs, step, "--resume", *more)
    runs(0, "--resume")
    assert OUT.read_bytes() == whole


@pytest.mark.slow
def test_killed_in_the_dense_baseline(runs: Runs) -> None:
    runs.words = (*TINY, "--baseline-epochs", "5")
    whole = runs.whole()
    for entry in Path("cache").iterdir():
        entry.unlink()
    killed(runs, 7, "--checkpoint-steps", "3")  # of ten
    assert kept() == ["00-0000000004.safetensors", "00-0000000006.safetensors"]
    said = runs(0, "--resume", "--checkpoint-steps", "3")
    assert "Resuming the dense baseline after step 6, from out.checkpoints" in said
    assert "epoch 4 of 5" in said
    assert "epoch 3 of 5" not in said
    assert OUT.read_bytes() == whole


RECIPE = """
[[stage]]
epochs = 2
lr = 0.01
batch_size = 16
rule = [{ match = "*", scheme = "dense", sparsity = 0.5, sparsity_by = 0.5 }]
[[stage]]
epochs = 2
lr = 0.01
batch_size = 16
rule = [{ match = "8", scheme = "wfn" }, { match = "*", scheme = "kmeans", bits = 2 }]
"""


@pytest.mark.slow
@pytest.mark.parametrize("done", [8, 12])
def test_killed_in_each_stage_of_a_recipe(runs: Runs, done: int) -> None:
    Path("two.toml").write_text(RECIPE)
    at = TINY.index("--epochs")
    runs.words = (*TINY[:at], *runs.words[len(TINY) :], "-o", "out", "--recipe", "two.toml")
    whole = runs.whole()
    seen: list[int] = []

    def in_second_stage() -> None:
        seen.append(done)
        if len(seen) == 2:
            die()

    with pytest.raises(GoneError):
        runs(0, "--checkpoint-steps", "5", at=done, act=in_second_stage)
    said = runs(0, "--resume")
    assert f"Resuming stage 2 of 2 after step {6 if done < 12 else 10}, from" in said
    assert said.count("stage 1 was done before") == 2
    assert OUT.read_bytes() == whole


def test_a_diverged_run_is_given_up(runs: Runs, caplog: pytest.LogCaptureFixture) -> None:
    """After three tries at smaller steps; what is kept is the state from before."""
    said = runs.refused(5, "--lr", "1e38", "--opt", "sgd", "--checkpoint-steps", "1")
    assert said.startswith("training has diverged: the loss is ")
    assert said.endswith(
        ", with a learning rate of an 8th, too; try a lower --lr, or look at the data. The state after step 0 is kept "
        "in out.checkpoints: the same command with --resume goes on, at a 16th"
    )
    assert [message[-14:] for message in caplog.messages] == [f"({time} of 3 times)" for time in (1, 2, 3)]
    assert kept() == ["01-0000000000.safetensors"]
    weights = read_state(FOLDER / kept()[0])["state"]["parts"]["subject"]["model"]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
    assert not OUT.exists()


@pytest.mark.slow
def test_killed_after_a_rollback(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends in the same bytes as one that went back and was not killed."""
    real, calls = Compressor.loss, 0

    def loss(job: Compressor, *given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        return real(job, *given, **named) * (float("nan") if calls == 10 else 1)

    monkeypatch.setattr(Compressor, "loss", loss)
    runs(0)
    whole = OUT.read_bytes()
    OUT.unlink()
    calls = 0
    killed(runs, 8, "--checkpoint-steps", "1")  # the first time it comes there, so before it goes back
    calls = 8
    assert "Resuming stage 1 of 1 after step 8" in runs(0, "--resume")
    assert OUT.read_bytes() == whole


@pytest.mark.slow
def test_accumulated_batches(runs: Runs) -> None:
    """Six batches of 16 an epoch make two steps of four; either name is known."""
    assert "after step 2 of 8" in runs(7, "--grad-accum", "4", at=2, act=tell(signal.SIGTERM))
    runs(0, "--grad-accum-steps", "4", "--resume")
    with PackedFile.open(OUT) as file:
        assert dict(file.recipe or {})["stage"][0]["grad_accum"] == 4


@pytest.mark.slow
def test_mixed_averaged_and_decayed(runs: Runs) -> None:
    """timm's --mixup, --cutmix, --smoothing, --layer-decay and --model-ema-decay, stopped in the middle."""
    how = ("--mixup", "0.2", "--cutmix", "1", "--smoothing", "0.1", "--layer-decay", "0.7", "--model-ema-decay", "0.9")
    runs.words = (*runs.words, *how)
    whole = runs.whole()
    assert "after step 9 of 24" in runs(7, at=8, act=tell(signal.SIGTERM))
    assert "layer_decay" in runs.refused(2, "--resume", "--layer-decay", "0.8")
    runs(0, "--resume")
    assert OUT.read_bytes() == whole
    with PackedFile.open(OUT) as file:
        stage = dict(file.recipe or {})["stage"][0]
        assert [stage[name.removeprefix("--").replace("-", "_")] for name in how[::2]] == [0.2, 1, 0.1, 0.7, 0.9]


def test_a_run_that_ended_goes_on_with_more_epochs(runs: Runs) -> None:
    """Learning rates are those of the longer run from there on; a file of the shorter one is replaced by force."""
    runs.words = (*runs.words, "--scheme", "kmeans")

    def rates() -> list[str]:
        head, *rows = (line.split(",") for line in Path("out.summary.csv").read_text().splitlines())
        return [row[head.index("lr")] for row in rows]

    runs(0, "--keep-checkpoints", "--epochs", "1")
    assert kept() == ["01-0000000000.safetensors", "01-0000000006.safetensors"]
    refused = runs.refused(2, "--resume", "--epochs", "2")
    assert refused.startswith("out exists, and the run that --resume goes on with replaces it at its end: add --force")
    said = runs(0, "--resume", "--epochs", "2", "--force")
    assert "Resuming stage 1 of 1 after step 6, from out.checkpoints" in said
    assert "epoch 2 of 2" in said
    assert not FOLDER.exists()
    longer = rates()
    with PackedFile.open(OUT) as file:
        assert dict(file.recipe or {})["stage"][0]["epochs"] == 2
    runs(0, "--epochs", "2", "--force")
    assert rates()[1] == longer[1]
    assert rates()[0] != longer[0]
