"""Accuracy on a data set: the share of images that are right, its interval, and the model's mode."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compressor.formats.errors import MissingError
from compressor.training.evaluation import Evaluation, evaluate


@pytest.mark.parametrize(
    ("right", "images", "low", "high"), [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (90, 100, 0.8256, 0.9448)]
)
def test_the_interval_is_wilsons(right: int, images: int, low: float, high: float) -> None:
    found = Evaluation(torch.arange(images) < right, torch.zeros(images))
    assert (found.n, found.top1) == (images, right / images)
    assert found.interval == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_is_restored(training: bool) -> None:
    model = nn.Sequential(nn.Dropout(0.99), nn.Identity()).train(training)
    inputs = torch.eye(4)
    found = evaluate(model, [(inputs[:3], torch.tensor([0, 1, 0])), (inputs[3:], torch.tensor([3]))])
    assert found.correct.tolist() == [True, True, False, True]
    assert found.labels.tolist() == [0, 1, 0, 3]
    assert model.training is training
    assert model[0].training is training


def test_nothing_to_evaluate_on() -> None:
    with pytest.raises(MissingError, match="the data set to evaluate on is empty"):
        evaluate(nn.Identity(), [])
