"""A training that is resumed with more epochs: it goes on to their end, as a longer one would have from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compressor import SCHEMES, Compressor
from compressor.checkpointing.manager import Checkpoints
from compressor.formats.errors import InterruptionError, UsageError
from compressor.training.optim import make_optimizer
from tests.training.test_checkpointer import LOADERS, job_of, seed

STEPS = 6  # of an epoch


def train(job: Compressor, epochs: int, checkpoints: Checkpoints | None = None, stop_at: int = 0) -> bytes:
    def on_step(done: int, *_: object) -> None:
        if done == stop_at and checkpoints is not None:
            checkpoints.stop = True

    options: dict[str, Any] = {"epochs": epochs, "lr": 0.01, "sched": "none"}
    job.finetune(LOADERS["shuffled"](), **options, on_step=on_step, checkpoints=checkpoints)
    assert job.steps == job.total_steps == epochs * STEPS
    return job.finish().to_bytes()


def stopped(folder: Path, scheme: str, epochs: int, stop_at: int) -> None:
    seed(5)
    checkpoints = Checkpoints(folder)
    with pytest.raises(InterruptionError):
        train(job_of(scheme), epochs, checkpoints, stop_at)
    checkpoints.close()


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_any_scheme_goes_on_to_more_epochs(tmp_path: Path, scheme: str) -> None:
    stopped(tmp_path, scheme, 2, 8)
    train(job_of(scheme), 3, Checkpoints(tmp_path, resume=True))


@pytest.mark.parametrize("stop_at", [4, 2 * STEPS - 1])
def test_nothing_shows_that_it_was_shorter(tmp_path: Path, stop_at: int) -> None:
    """Where neither learning rate nor scheme depends on the length of the training."""
    seed(5)
    whole = train(job_of("kmeans"), 3)
    stopped(tmp_path, "kmeans", 2, stop_at)
    assert train(job_of("kmeans"), 3, Checkpoints(tmp_path, resume=True)) == whole


def test_one_that_had_ended_goes_on(tmp_path: Path) -> None:
    seed(5)
    whole = train(job_of("kmeans"), 3)
    seed(5)
    checkpoints = Checkpoints(tmp_path)
    train(job_of("kmeans"), 2, checkpoints)
    checkpoints.close()
    assert train(job_of("kmeans"), 3, Checkpoints(tmp_path, resume=True)) == whole


def test_fewer_epochs_are_refused(tmp_path: Path) -> None:
    stopped(tmp_path, "kmeans", 3, 2)
    with pytest.raises(UsageError, match="epochs was 3, is 2"):
        train(job_of("kmeans"), 2, Checkpoints(tmp_path, resume=True))


@pytest.mark.parametrize(("stage", "now", "is_refused"), [(1, [5, 6], False), (2, [4, 6], False), (2, [5, 6], True)])
def test_a_stage_that_is_done_stays_as_it_was(tmp_path: Path, stage: int, now: list[int], is_refused: bool) -> None:
    def opened(epochs: list[int], resume: bool) -> Checkpoints:
        about = {"recipe": {"stage": [{"epochs": count, "rule": []} for count in epochs]}, "seed": 0}
        return Checkpoints(tmp_path, about, resume=resume)

    first = opened([4, 4], resume=False)
    first.stage = stage
    first.save(1, {"step": 1}, {"epochs": 4})
    first.close()
    if is_refused:
        with pytest.raises(UsageError, match=r"recipe.stage 1.epochs was 4, is 5\. Give"):
            opened(now, resume=True)
    else:
        opened(now, resume=True).close()


@pytest.mark.parametrize("sched", ["cosine", "step", "tanh", "poly", "multistep"])
def test_the_rate_is_that_of_the_longer_training(sched: str) -> None:
    """Twenty steps in place of ten; of the second group a round began after three steps, to end at six tenths."""
    parameters = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    groups = [{"params": [one], "lr": 1.0} for one in parameters]

    def after(steps: int, epochs: int, length: int, state: Any = None) -> Any:
        optimizer, schedule = make_optimizer([dict(group) for group in groups], "sgd", 1.0, sched, epochs, 5)
        if state is not None:
            optimizer.load_state_dict(state[0])
            schedule.load_state_dict(state[1])
        for step in range(0 if state is None else 5, steps):
            if step == 3:
                schedule.restart([parameters[1]], length)
            schedule.step()
        return [group["lr"] for group in optimizer.param_groups], (optimizer.state_dict(), schedule.state_dict())

    begun = after(5, 2, length=3)[1]
    for steps in (5, 6, 9, 11, 14):
        expected = after(steps, 4, length=9)[0]
        assert after(steps, 4, length=0, state=begun)[0] == pytest.approx(expected)
