"""A small training job, and ways to spoil its loss."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from compressor import Compressor, Policy, Rule
from compressor.checkpointing.manager import Checkpoints

STEPS = 6  # of an epoch


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces garbage collection, which frees nothing here and takes longer than a training."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)


def loader(batch: int = 4) -> DataLoader[Any]:
    random = torch.Generator().manual_seed(3)
    data = TensorDataset(torch.randn(4 * STEPS, 12, generator=random), torch.randint(3, (24,), generator=random))
    return DataLoader(data, batch, shuffle=True, generator=random)


def job_of(scheme: str = "learnt", dropout: float = 0.3, **settings: Any) -> Compressor:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 24), nn.Dropout(dropout), nn.ReLU(), nn.Linear(24, 3))
    return Compressor(net, Policy([Rule("*", scheme=scheme, **settings)]), seed=1).prepare()


class Accident:
    """Spoils the loss of a job at some calls, counted from 1."""

    def __init__(self, job: Compressor, at: set[int], value: float = math.nan) -> None:
        self.calls, self.at, self.value, self.loss = 0, at, value, job.loss
        job.loss = self  # type: ignore[method-assign, assignment]

    def __call__(self, output: Tensor, target: Tensor, inputs: Tensor) -> Tensor:
        self.calls += 1
        loss = self.loss(output, target, inputs)
        return loss * self.value if self.calls in self.at else loss


def finetuned(job: Compressor, folder: Path | None = None, resume: bool = False, **options: Any) -> bytes:
    checkpoints = None if folder is None else Checkpoints(folder, resume=resume, steps=2)
    try:
        job.finetune(loader(), **{"epochs": 3, "lr": 0.01, **options}, checkpoints=checkpoints)
    finally:
        if checkpoints is not None:
            checkpoints.close()
    return job.finish().to_bytes()


def close(job: Compressor, other: Compressor) -> bool:
    """Returns whether the trained weights agree up to rounding: sums over parts round differently."""
    pairs = zip(job.model.parameters(), other.model.parameters(), strict=True)
    return all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)
