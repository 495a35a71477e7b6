"""The training loop and evaluation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from compressor.formats.errors import MissingError, QualityError, UsageError
from compressor.training.evaluation import Evaluation, evaluate
from compressor.training.loop import Epoch, train
from compressor.training.optim import make_optimizer


def loader(n: int = 20, batch: int = 4) -> DataLoader[Any]:
    torch.manual_seed(0)
    x = torch.randn(n, 3)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch)


def cross_entropy(output: Tensor, target: Tensor, inputs: Tensor) -> Tensor:
    del inputs
    return functional.cross_entropy(output, target)


def test_trains_every_batch_of_every_epoch() -> None:
    model, data = nn.Linear(3, 2), loader()
    optimizer, schedule = make_optimizer([{"params": list(model.parameters())}], "sgd", 1.0, "cosine", 8, len(data))
    epochs: list[Epoch] = []
    steps: list[tuple[int, int]] = []
    train(model, data, cross_entropy, optimizer, schedule, 8, epochs.append, lambda *at: steps.append(at[:2]))
    assert [epoch.number for epoch in epochs] == list(range(1, 9))
    assert steps == [(n, 40) for n in range(1, 41)]
    assert epochs[-1].loss < epochs[0].loss
    assert evaluate(model, data).top1 > 0.9
    assert optimizer.param_groups[0]["lr"] < 0.01, "the cosine has come down"


def test_a_loss_that_is_no_number_stops_the_run() -> None:
    model, data = nn.Linear(3, 2), loader()
    optimizer, schedule = make_optimizer([{"params": list(model.parameters())}], "sgd", 0.1, "cosine", 1, len(data))
    with pytest.raises(QualityError, match="diverged"):
        train(model, data, lambda o, t, x: cross_entropy(o, t, x) * math.nan, optimizer, schedule, 1)


@pytest.mark.parametrize(("opt", "sched"), [("adamm", "cosine"), ("sgd", "cosin")])
def test_unknown_names_are_refused(opt: str, sched: str) -> None:
    with pytest.raises(UsageError, match=f"{opt}|{sched}"):
        make_optimizer([{"params": list(nn.Linear(2, 2).parameters())}], opt, 0.1, sched, 1, 2)


def test_evaluation_keeps_the_mode_and_counts() -> None:
    model = nn.Sequential(nn.Dropout(1.0), nn.Linear(3, 2)).train()
    result = evaluate(model, loader())
    assert model.training
    assert result.n == 20
    low, high = Evaluation(torch.tensor([True, False]), torch.zeros(2)).interval
    assert low == pytest.approx(0.0945, abs=1e-3)
    assert high == pytest.approx(0.9055, abs=1e-3)
    with pytest.raises(MissingError, match="empty"):
        evaluate(model, [])


def test_a_round_restarts_the_rate_of_its_own_parameters() -> None:
    """Two groups under one cosine of 8 steps; after 4, one begins a round of 2 steps, and ends where it began."""
    mine, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    groups = [{"params": [mine], "lr": 1.0}, {"params": [other], "lr": 1.0}]
    optimizer, schedule = make_optimizer(groups, "sgd", 1.0, "cosine", 1, 8)
    rates = []
    for step in range(8):
        if step == 4:
            schedule.restart([mine], 2)
        rates.append([group["lr"] for group in optimizer.param_groups])
        schedule.step()
    cosine = [0.5 + 0.5 * math.cos(math.pi * step / 8) for step in range(8)]
    assert [rate[1] for rate in rates] == pytest.approx(cosine, abs=1e-4)
    assert [rate[0] for rate in rates] == pytest.approx([*cosine[:4], 1.0, 0.5, 0.0, 0.0], abs=1e-4)
