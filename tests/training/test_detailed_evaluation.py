"""Top-5, loss and accuracy by class, against a slow twin."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from compressor.data.splits import UNREADABLE
from compressor.formats.errors import MissingError
from compressor.training.detailed_evaluation import measure
from compressor.training.evaluation import evaluate


def batches(count: int, classes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(count, classes, generator=generator)
    labels = torch.randint(classes, (count,), generator=generator)
    return list(zip(scores.split(7), labels.split(7), strict=True))


@pytest.mark.parametrize("classes", [3, 9])
def test_figures_are_those_of_a_slow_twin(classes: int) -> None:
    data = batches(40, classes)
    found = measure(nn.Identity(), data)
    rows = [(row.tolist(), int(label)) for scores, labels in data for row, label in zip(scores, labels, strict=True)]
    above = [sum(score > row[label] for score in row) for row, label in rows]
    losses = [math.log(sum(map(math.exp, row))) - row[label] for row, label in rows]
    assert found.top1 == sum(rank == 0 for rank in above) / 40
    assert found.top5 == sum(rank < 5 for rank in above) / 40
    assert found.loss == pytest.approx(sum(losses) / 40, rel=1e-5)
    assert found.n == 40
    assert torch.equal(found.correct, evaluate(nn.Identity(), data).correct)
    other = evaluate(nn.Identity(), data)
    counts = zip(found.count(classes), other.count(classes), found.count(classes, other.correct), strict=True)
    for number, (images, same, right) in enumerate(counts):
        own = [rank for rank, (_, label) in zip(above, rows, strict=True) if label == number]
        assert (images, same, right) == (len(own), len(own), sum(rank == 0 for rank in own))
    assert found.images_per_second > 0


def test_images_that_cannot_be_read_are_left_out() -> None:
    data = batches(21, 6)
    whole = measure(nn.Identity(), data)
    data[1][1][3] = UNREADABLE
    data[2][1][:] = UNREADABLE
    kept = torch.ones(21, dtype=torch.bool)
    kept[10], kept[14:] = False, False
    found = measure(nn.Identity(), data)
    assert torch.equal(found.correct, whole.correct[kept])
    assert torch.equal(found.losses, whole.losses[kept])


def test_nothing_to_measure() -> None:
    with pytest.raises(MissingError, match="empty"):
        measure(nn.Identity(), [])
