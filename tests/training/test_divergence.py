"""A loss or weights that are no numbers, in the middle of a training: it goes back and on, or ends in one line."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from compressor import SCHEMES, Compressor, Policy, Rule
from compressor.checkpointing.manager import Checkpoints
from compressor.formats.errors import InterruptionError, QualityError
from compressor.training import checkpointer
from tests.helpers.accidents import STEPS, Accident, _fast, finetuned, job_of, loader

__all__ = ["_fast"]  # the fixture


def rates_of(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Note the learning rate of every step."""
    found: list[float] = []
    real = torch.optim.AdamW.step

    def step(self: Any, *given: Any) -> Any:
        found.append(self.param_groups[0]["lr"])
        return real(self, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return found


@pytest.mark.parametrize("kept", ["in memory", "in checkpoints"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_epoch_restarts_at_half_the_learning_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kept: str, value: float
) -> None:
    rates = rates_of(monkeypatch)
    finetuned(job_of())
    whole = list(rates)
    rates.clear()
    job = job_of()
    Accident(job, {9}, value)
    finetuned(job, tmp_path / "c" if kept == "in checkpoints" else None)
    assert rates == whole[:8] + [rate / 2 for rate in whole[6:]]  # the step with that loss was not taken
    assert caplog.messages == [
        f"training has diverged: the loss is {value} at step 9: going back to the state after step 6, with half the "
        "learning rate (1 of 3 times)"
    ]


@pytest.mark.parametrize("settings", [{}, {"sparsity": 0.5, "sparsity_by": 0.7}], ids=["", "pruned"])
@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_rollback_under_every_scheme(tmp_path: Path, scheme: str, settings: dict[str, Any]) -> None:
    """To the same state whether it was kept in memory or in a file, and whether or not the run was then resumed."""
    given = [job_of(scheme, **settings) for _ in range(3)]
    for job in given[:2]:
        Accident(job, {11, 20})
    whole = finetuned(given[0])
    assert finetuned(given[1], tmp_path / "a") == whole
    Accident(given[2], {11})
    first = Checkpoints(tmp_path / "b", steps=4)

    def on_step(done: int, total: int, loss: Tensor) -> None:
        first.stop = done == 13

    with pytest.raises(InterruptionError, match="after step 14 of 18"):
        given[2].finetune(loader(), epochs=3, lr=0.01, checkpoints=first, on_step=on_step)
    first.close()
    resumed = job_of(scheme, **settings)
    Accident(resumed, {1})
    assert finetuned(resumed, tmp_path / "b", resume=True) == whole


@pytest.mark.parametrize("kept", ["in memory", "in checkpoints"])
def test_gives_up_after_three_rollbacks(tmp_path: Path, caplog: pytest.LogCaptureFixture, kept: str) -> None:
    job, folder = job_of(), tmp_path / "c" if kept == "in checkpoints" else None
    Accident(job, {8, 9, 11, 15})
    with pytest.raises(QualityError) as caught:
        finetuned(job, folder)
    where = "in the model" if folder is None else f"in {folder}: the same command with --resume (resume=True) goes on"
    assert str(caught.value) == (
        "training has diverged: the loss is nan at step 10, with a learning rate of an 8th, too; try a lower --lr, or "
        f"look at the data. The state after step 6 is kept {where}, at a 16th"
    )
    assert len(caplog.messages) == 3
    good = job_of()
    with pytest.raises(StopIteration):
        good.finetune(loader(), epochs=3, lr=0.01, on_epoch=stop_at_first)
    state, expected = job.state_dict(), good.state_dict()
    assert state["steps"] == expected["steps"] == STEPS
    assert all(torch.equal(tensor, expected["model"][name]) for name, tensor in state["model"].items())


def stop_at_first(epoch: Any, top1: float | None) -> None:
    raise StopIteration


def test_a_diverged_training_resumes_with_a_smaller_learning_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = rates_of(monkeypatch)
    finetuned(job_of())
    whole = list(rates)
    job = job_of()
    Accident(job, set(range(9, 100)))
    with pytest.raises(QualityError):
        finetuned(job, tmp_path / "c")
    rates.clear()
    finetuned(job_of(), tmp_path / "c", resume=True)
    assert rates == [rate / 16 for rate in whole[6:]]


def test_non_finite_weights_after_a_finite_loss_are_found(caplog: pytest.LogCaptureFixture) -> None:
    """The last gradient of the training is none: no loss would ever tell."""
    job = job_of()
    hook = job.model[0].bias.register_hook(poison(at=18))  # type: ignore[index]
    finetuned(job)
    hook.remove()
    assert caplog.messages == [
        "training has diverged: weights are no longer numbers at step 19: going back to the state after step 12, with "
        "half the learning rate (1 of 3 times)"
    ]
    assert all(bool(torch.isfinite(p).all()) for p in job.model.parameters())


def poison(at: int) -> Callable[[Tensor], Tensor]:
    calls = 0

    def hook(gradient: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return gradient * math.nan if calls == at else gradient

    return hook


def test_the_loss_on_a_gpu_is_read_every_few_steps(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On another device the loss is looked at every 50 steps, at the end of an epoch and before anything is kept."""

    from compressor.training import loop

    monkeypatch.setattr(loop, "STEPS_BETWEEN_CHECKS", 4)
    monkeypatch.setattr(loop, "is_readable_at_once", lambda device: False)
    job = job_of()
    accident = Accident(job, {9, 15})
    finetuned(job)
    assert [message.partition(" step ")[2].partition(":")[0] for message in caplog.messages] == ["13", "13"]
    # 12 steps, of which 9 is bad; from 7 on again to 12, the 15th call is step 9; then to the end
    assert accident.calls == 12 + 6 + 12
    assert all(bool(torch.isfinite(p).all()) for p in job.model.parameters())


@pytest.mark.parametrize(("scheme", "each"), [("learnt", 12), ("kmeans", 5), ("inq", 13)])
def test_the_memory_of_the_state_to_go_back_to(monkeypatch: pytest.MonkeyPatch, scheme: str, each: int) -> None:
    """With AdamW, in bytes a weight, as docs/resuming.md says."""
    taken = []
    real = checkpointer._copy_to_cpu

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            taken.append(value.nbytes)
        return real(value)

    monkeypatch.setattr(checkpointer, "_copy_to_cpu", copied)
    torch.manual_seed(0)
    job = Compressor(nn.Linear(300, 300), Policy([Rule("*", scheme=scheme, bits=5)])).prepare()
    data = TensorDataset(torch.randn(4, 300), torch.zeros(4, dtype=torch.int64))
    marks: list[int] = []
    job.finetune(DataLoader(data, 4), epochs=5, on_epoch=lambda *_: marks.append(len(taken)))
    most = max(sum(taken[begin:end]) for begin, end in itertools.pairwise(marks))  # a round begins without moments
    assert most / 300**2 == pytest.approx(each, abs=0.3)


def test_rollback_skips_damaged_checkpoints(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where the state of the epoch's beginning is damaged, the one before it is gone back to; without any, it ends."""
    job, folder = job_of(), tmp_path / "c"
    accident = Accident(job, {14, 20})

    def damage(*_: object) -> None:
        if accident.calls in (13, 19):
            for path in sorted(folder.glob("*.safetensors"))[1 if accident.calls == 13 else 0 :]:
                path.write_bytes(path.read_bytes()[:-1])

    checkpoints = Checkpoints(folder, steps=5)
    with pytest.raises(QualityError, match="no earlier state is left to go back to"):
        job.finetune(loader(), epochs=3, lr=0.01, checkpoints=checkpoints, on_step=damage)
    assert "going back to the state after step 10" in " ".join(caplog.messages)
    checkpoints.close()


def test_a_log_line_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    job = job_of()
    Accident(job, {2})
    finetuned(job)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
