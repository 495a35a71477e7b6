"""Gradients that are added up over several batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from compressor import Compressor
from compressor.checkpointing.manager import Checkpoints
from compressor.formats.errors import InterruptionError, UsageError
from tests.helpers.accidents import _fast, close, finetuned, job_of, loader

__all__ = ["_fast"]  # the fixture


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_accumulated_gradients_are_those_of_a_larger_batch(opt: str) -> None:
    """Three batches of 4 make the step that one of 12 makes; at the end of an epoch what is left, here two of 4."""
    jobs, steps = [job_of("dense", dropout=0) for _ in range(2)], []
    data = [(x, y) for x, y in DataLoader(loader().dataset, 20)][:1]
    for job, size, grad_accum in zip(jobs, (12, 4), (1, 3), strict=True):
        few = DataLoader(TensorDataset(*data[0]), size)
        steps.append([(done, total) for done, total in progress(job, few, opt, grad_accum)])
    assert steps[0] == steps[1] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert close(*jobs)


def progress(job: Compressor, data: DataLoader[Any], opt: str, grad_accum: int) -> list[tuple[int, int]]:
    seen: list[tuple[int, int]] = []
    job.finetune(data, epochs=2, lr=0.01, opt=opt, grad_accum=grad_accum, on_step=lambda *at: seen.append(at[:2]))
    return seen


def test_accumulation_goes_on(tmp_path: Path) -> None:
    whole = finetuned(job_of(), grad_accum=2)
    first = Checkpoints(tmp_path / "c")

    def on_step(done: int, total: int, loss: Tensor) -> None:
        first.stop = done == 4
        assert total == 9

    with pytest.raises(InterruptionError, match="after step 5 of 9"):
        job_of().finetune(loader(), epochs=3, lr=0.01, grad_accum=2, checkpoints=first, on_step=on_step)
    first.close()
    again = Checkpoints(tmp_path / "c", resume=True)
    with pytest.raises(UsageError, match="grad_accum was 2, is 3"):
        job_of().finetune(loader(), epochs=3, lr=0.01, grad_accum=3, checkpoints=again)
    again.close()
    assert finetuned(job_of(), tmp_path / "c", resume=True, grad_accum=2) == whole
    with pytest.raises(UsageError, match="grad_accum must be at least 1, got 0"):
        finetuned(job_of(), grad_accum=0)
