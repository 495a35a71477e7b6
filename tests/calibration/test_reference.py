"""The reference: how far the answers of a model are from those of the dense one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from compressor.calibration.reference import Reference


def layer(weight: list[list[float]]) -> nn.Linear:
    linear = nn.Linear(len(weight[0]), len(weight), bias=False)
    linear.weight.data = torch.tensor(weight)
    return linear


def test_the_loss_is_the_mean_divergence_from_the_dense_answers() -> None:
    """Dense, the classes have odds of 3 to 1 for the first image, and are alike for the second."""
    images = torch.tensor([[1.0], [0.0]])
    reference = Reference(layer([[math.log(3)], [0.0]]), {}, images)
    assert reference.loss(layer([[math.log(3)], [0.0]])) == 0
    expected = (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)) / 2
    assert reference.loss(layer([[0.0], [0.0]])) == pytest.approx(expected, rel=1e-5)


def test_the_dense_weights_are_those_given() -> None:
    images = torch.randn(10, 3)
    dense, present = layer([[1.0, 2.0, 0.0], [0.5, 0.0, 1.0]]), layer([[1.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    given, plain = Reference(present, {"weight": dense.weight.detach()}, images), Reference(dense, {}, images)
    assert torch.equal(given.answers, plain.answers)
    assert given.loss(present) == plain.loss(present) > 0
    assert present.weight.tolist() == [[1.0, 2.0, 0.0], [0.0, 0.0, 1.0]]


def test_many_images_and_positions_are_averaged() -> None:
    torch.manual_seed(0)
    model, other = nn.Conv2d(1, 3, 1), nn.Conv2d(1, 3, 1)
    images = torch.randn(300, 1, 2, 2)  # more than one batch
    found = Reference(model, {}, images).loss(other)
    with torch.no_grad():
        p, q = (one(images).double().movedim(1, -1).reshape(-1, 3).log_softmax(1) for one in (model, other))
    assert len(p) == 1200
    assert found == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-4)


class Mode(nn.Module):
    """Answers otherwise in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        answer: Tensor = self.layer(inputs)
        return answer * 0 if self.training else answer


def test_models_answer_in_eval_mode_and_stay_in_theirs() -> None:
    model = Mode().train()
    model.layer.eval()
    reference = Reference(model, {}, torch.randn(4, 2))
    assert reference.loss(model) == 0
    assert model.training
    assert not model.layer.training
    assert float(reference.answers.std()) > 0


def test_half_precision_models_are_compared() -> None:
    model, images = nn.Linear(3, 2), torch.randn(20, 3)
    reference = Reference(model, {}, images)
    assert reference.answers.dtype == torch.float32
    assert 0 <= reference.loss(model.bfloat16()) < 1e-3
