"""``finetune`` with checkpoints: any loader, any scheme's state, and the pieces they go on from."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from compressor import SCHEMES, Compressor, Policy, Rule
from compressor.checkpointing.manager import Checkpoints
from compressor.checkpointing.progress import TrainingProgress, loader_rng_state, remaining_batches
from compressor.formats.errors import InterruptionError, UsageError
from compressor.training.optim import make_optimizer


class Noisy(Dataset[Any]):
    """What is random about an item comes from all three generators."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = random.random() + np.random.rand() + float(torch.rand(()))  # noqa: NPY002
        return torch.linspace(-1, 1, 12) * (index + 1) + noise, index % 3


class Seeded(Dataset[Any]):
    """Nothing is random about an item."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.rand(12, generator=torch.Generator().manual_seed(index)), index % 3


class Stream(IterableDataset[Any]):
    """It can be skipped only by reading it."""

    def __len__(self) -> int:
        return 22

    def __iter__(self) -> Iterator[Any]:
        return (Noisy()[index] for index in range(22))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "in order": lambda: DataLoader(Noisy(), 4),
    "shuffled": lambda: DataLoader(Noisy(), 4, shuffle=True),
    "own generator": lambda: DataLoader(Noisy(), 4, shuffle=True, generator=generator(), drop_last=True),
    "stream": lambda: DataLoader(Stream(), 4),
    "workers": lambda: DataLoader(Seeded(), 4, shuffle=True, num_workers=2),
    "own generator, workers": lambda: DataLoader(Seeded(), 4, shuffle=True, generator=generator(), num_workers=1),
}


def job_of(scheme: str = "learnt", **settings: Any) -> Compressor:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.Dropout(0.3), nn.ReLU(), nn.Linear(24, 3))
    return Compressor(net, Policy([Rule("*", scheme=scheme, **settings)]), seed=1).prepare()


def train(job: Compressor, loader: DataLoader[Any], checkpoints: Checkpoints | None, stop_at: int = 0) -> bytes:
    def on_step(done: int, *_: object) -> None:
        if done == stop_at and checkpoints is not None:
            checkpoints.stop = True

    job.finetune(loader, epochs=3, lr=0.01, on_step=on_step, checkpoints=checkpoints)
    return job.finish().to_bytes()


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002


@pytest.mark.parametrize("stop_at", [1, 7])
@pytest.mark.parametrize("kind", LOADERS)
def test_any_loader_goes_on(tmp_path: Path, kind: str, stop_at: int) -> None:
    make = LOADERS[kind]
    seed(5)
    whole = train(job_of(), make(), None)
    seed(5)
    first = Checkpoints(tmp_path / "c")
    with pytest.raises(InterruptionError, match=f"after step {stop_at + 1} of "):
        train(job_of(), make(), first, stop_at)
    first.close()
    seed(6)
    assert train(job_of(), make(), Checkpoints(tmp_path / "c", resume=True)) == whole


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
@pytest.mark.parametrize("settings", [{}, {"sparsity": 0.5, "sparsity_by": 0.7}], ids=["", "pruned"])
def test_any_scheme_goes_on(tmp_path: Path, scheme: str, settings: dict[str, Any]) -> None:
    seed(5)
    whole = train(job_of(scheme, **settings), LOADERS["shuffled"](), None)
    seed(5)
    first = Checkpoints(tmp_path / "c")
    with pytest.raises(InterruptionError):
        train(job_of(scheme, **settings), LOADERS["shuffled"](), first, stop_at=9)
    first.close()
    resumed = job_of(scheme, **settings)
    assert train(resumed, LOADERS["shuffled"](), Checkpoints(tmp_path / "c", resume=True)) == whole


def test_another_training_is_refused(tmp_path: Path) -> None:
    """Without a command there is as much to check: rules, rates, weights and the loader's length."""
    first = Checkpoints(tmp_path / "c")
    with pytest.raises(InterruptionError):
        train(job_of(), LOADERS["in order"](), first, 7)
    first.close()
    again = Checkpoints(tmp_path / "c", resume=True)
    with pytest.raises(UsageError, match=r"rules 1\.codewords was 16, is 3"):
        train(job_of(codewords=3), LOADERS["in order"](), again)
    with pytest.raises(UsageError, match="steps of an epoch was 6, is 5"):
        train(job_of(), LOADERS["own generator"](), again)
    again.clear()
    assert not (tmp_path / "c").exists()


def test_another_machine_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Checkpoints(tmp_path / "c")
    first.save(1, {}, {})
    first.close()
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    with caplog.at_level(logging.WARNING):
        Checkpoints(tmp_path / "c", resume=True).clear()
    (warning,) = caplog.messages
    assert warning.startswith("torch was ")
    assert warning.endswith('is "9.9.9": the file will not be the same to the last bit')


def test_checkpoints_by_time_and_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("compressor.checkpointing.manager.time.monotonic", lambda: now)
    by_time = Checkpoints(tmp_path / "a", minutes=2)
    assert not by_time.due(1)
    now = 120.0
    assert by_time.due(1)
    by_time.save(1, {}, {})
    assert not by_time.due(1)
    by_steps = Checkpoints(tmp_path / "b", minutes=0, steps=3)
    now = 1e9
    assert [by_steps.due(step) for step in (1, 2, 3, 4)] == [False, False, True, False]


def test_the_rest_of_an_epoch_is_all_that_is_loaded() -> None:
    opened: list[int] = []

    class Counted(Seeded):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            opened.append(index)
            return super().__getitem__(index)

    loader = DataLoader(Counted(), 4, shuffle=True)
    begun = loader_rng_state(loader)
    every = [labels.tolist() for _, labels in remaining_batches(loader, TrainingProgress())]
    order = list(opened)
    opened.clear()
    rest = [
        labels.tolist()
        for _, labels in remaining_batches(loader, TrainingProgress(batches=4, rng_at_epoch_start=begun))
    ]
    assert rest == every[4:]
    assert opened == order[16:]
    assert not list(remaining_batches(loader, TrainingProgress(batches=6, rng_at_epoch_start=begun)))


@pytest.mark.parametrize("sched", ["cosine", "step", "tanh", "poly", "multistep"])
def test_schedules_go_on_in_a_round(sched: str) -> None:
    """After six of ten steps, three into a round of five that one group began."""

    def rates(split: bool) -> list[list[float]]:
        mine, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
        groups = [{"params": [mine], "lr": 1.0}, {"params": [other], "lr": 1.0}]
        optimizer, schedule = make_optimizer(groups, "sgd", 1.0, sched, 2, 5)
        found = []
        for step in range(10):
            if step == 3:
                schedule.restart([mine], 5)
            if step == 6 and split:
                states = optimizer.state_dict(), schedule.state_dict()
                optimizer, schedule = make_optimizer(groups, "sgd", 1.0, sched, 2, 5)
                optimizer.load_state_dict(states[0])
                schedule.load_state_dict(states[1])
            found.append([group["lr"] for group in optimizer.param_groups])
            schedule.step()
        return found

    assert rates(True) == rates(False)
