"""Training to a size begins with finer grids than the size asks for, where it is long enough to come down from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.checkpointing.manager import Checkpoints
from compressor.compressor import Compressor
from compressor.policy.policy import Policy, Rule
from compressor.sharing.code_length import CodeLength
from tests.helpers.sums import batches, net

TARGET, EPOCHS = 4_000, 5  # of 60 steps
FAR = 1e-7  # the answers of a network of random weights hardly differ
PRICED = Policy([Rule("*", "learnt", rate=1e-4)])


@pytest.fixture(autouse=True)
def a_long_training_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.lifecycle.fitting.LEAST_STEPS", EPOCHS * 60)
    monkeypatch.setattr("compressor.lifecycle.fitting.FAR", FAR)


def prepared(policy: Policy | None = None, images: bool = True, **options: Any) -> Compressor:
    given = {"target_size": TARGET, "distill": 0.0, "teacher": None, **options}
    return Compressor(net(), policy, **given).prepare(calibration=next(iter(batches()))[0] if images else None)


def steps_of(job: Compressor) -> list[float]:
    return [CodeLength(group).grid[1] for group in job.groups]


class StoppedError(Exception):
    """Ends a training after its first step."""


def first_step(job: Compressor, epochs: int = EPOCHS) -> Compressor:
    def stop(*_: object) -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        job.finetune(batches(), epochs=epochs, lr=0.0, on_step=stop)
    return job


def test_grids_are_those_of_half_the_price_and_the_file_is_still_at_most_the_target() -> None:
    job = prepared()
    assert job.search is not None
    found, coarse = job.search, steps_of(job)
    first: dict[str, Any] = {}

    def note(step: int, *_: object) -> None:
        first.setdefault("predicted", job.control.predicted if job.control else 0)
        first.setdefault("steps", steps_of(job))

    job.finetune(batches(), epochs=EPOCHS, lr=3e-3, on_step=note)
    assert job.search.rate == found.rate / 2
    assert first["predicted"] > 1.05 * TARGET
    assert first["steps"] == pytest.approx([step / 2**0.5 for step in coarse], rel=1e-6)
    assert job.control is not None
    assert job.control.target == TARGET
    packed = job.finish()
    assert 0.97 * TARGET <= len(packed.to_bytes()) <= TARGET


def test_it_begins_nearer_to_the_dense_answers() -> None:
    inputs = torch.cat([one for one, _ in batches()])
    job = prepared(target_size=1_200)
    dense = prepared(target_size=1_200).undo().eval()

    @torch.no_grad()
    def distance() -> float:
        return float((job.model.eval()(inputs) - dense(inputs)).square().mean())

    coarse = distance()
    job.model.train()
    first_step(job)
    assert distance() < 0.8 * coarse


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        (None, {"target_size": None, "rate": 1e-4}),
        (PRICED, {"target_size": None}),
        (Policy([Rule("*", "learnt", rate=1e-7, sparsity=0.3)]), {}),
        (Policy([Rule("3", "kmeans", bits=2), Rule("*", "learnt", rate=1e-7)]), {}),
    ],
    ids=["a price", "a price of the policy", "pruned", "another scheme beside it"],
)
def test_nothing_changes_where_no_size_is_held_by_a_price_alone(policy: Policy | None, options: dict[str, Any]) -> None:
    job = prepared(policy, **options)
    groups = job.groups
    assert first_step(job).groups is groups


def test_nothing_changes_where_the_training_is_short() -> None:
    job = prepared()
    groups = job.groups
    assert first_step(job, EPOCHS - 1).groups is groups


def test_nothing_changes_where_the_answers_are_near_the_dense_ones() -> None:
    job = prepared(target_size=10_000)
    groups = job.groups
    assert first_step(job).groups is groups


def test_nothing_changes_without_images() -> None:
    job = prepared(images=False)
    groups = job.groups
    assert first_step(job).groups is groups


def test_a_tensor_that_was_frozen_keeps_its_values() -> None:
    job = prepared()
    model: Any = job.model
    model[0].parametrizations.weight.original.requires_grad_(False)
    before = model[0].weight.detach().clone()
    job.finetune(batches(), epochs=EPOCHS, lr=1e-3)
    assert torch.equal(model[0].weight, before)


def test_it_begins_anew_once() -> None:
    job = first_step(prepared())
    job.steps = 0  # as where the first step has failed
    groups = job.groups
    assert first_step(job).groups is groups


def test_a_training_that_goes_on_keeps_its_grids() -> None:
    job = prepared()
    job.finetune(batches(), epochs=1, lr=1e-3)
    groups = job.groups
    job.finetune(batches(), epochs=EPOCHS, lr=1e-3)
    assert job.groups is groups


def test_ctrl_c_while_grids_are_made_finer_leaves_the_job_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    job, other = prepared(), prepared()

    def interrupted(*_: object) -> Sequence[object]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("compressor.lifecycle.fitting.fit_groups", interrupted)
        with pytest.raises(KeyboardInterrupt):
            job.finetune(batches(), epochs=EPOCHS)
    assert job.finish().to_bytes() == other.finish().to_bytes()


def test_a_resumed_training_ends_in_the_same_bytes(tmp_path: Path) -> None:
    def trained(folder: Path, stop_at: int | None, resume: bool) -> bytes:
        job = prepared()

        def stop(step: int, *_: object) -> None:
            if step == stop_at:
                raise StoppedError

        checkpoints = Checkpoints(folder, resume=resume, steps=10)
        job.finetune(batches(), epochs=EPOCHS, lr=3e-3, on_step=stop, checkpoints=checkpoints)
        return job.finish().to_bytes()

    whole = trained(tmp_path / "whole", None, False)
    with pytest.raises(StoppedError):
        trained(tmp_path / "cut", 47, False)
    assert trained(tmp_path / "cut", None, True) == whole
