"""One step on parts of unequal size: the gradient is that of the mean over the images, not over the parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compressor.training.mixed_precision import MixedPrecision
from compressor.training.step import TrainStep


def step_of() -> tuple[TrainStep, nn.Linear]:
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with torch.no_grad():
        model.weight.fill_(0.0)

    def loss(output: Tensor, target: Tensor, inputs: Tensor) -> Tensor:
        del inputs
        return (output - target).mean()

    return TrainStep(MixedPrecision(torch.device("cpu"), False), model, optimizer, loss), model


def batch(*inputs: float) -> tuple[Tensor, Tensor]:
    return torch.tensor(inputs, dtype=torch.float32).view(-1, 1), torch.full((len(inputs), 1), 2.0)


def test_batches_of_unequal_size() -> None:
    """Images 1, 2, 3 and 10: the gradient of w is their mean, 4; over the two batches it would be (2 + 10) / 2."""
    step, model = step_of()
    loss = step.gradients([batch(1, 2, 3), batch(10)])
    assert model.weight.grad is not None
    assert model.weight.grad.tolist() == [[4.0]]
    assert float(loss) == -2.0
    step.apply()
    assert model.weight.tolist() == [[-2.0]]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_a_batch_in_parts_of_unequal_size(size: int) -> None:
    """Images 1, 2, 3, 4 and 20: their mean is 6, however few go through the model at a time."""
    step, model = step_of()
    step.size = size
    loss = step.gradients([batch(1, 2, 3, 4, 20)])
    assert model.weight.grad is not None
    assert float(model.weight.grad) == pytest.approx(6.0, abs=1e-5)
    assert float(loss) == pytest.approx(-2.0, abs=1e-6)


def test_gradients_of_the_step_before_are_dropped() -> None:
    step, model = step_of()
    for _ in range(2):
        step.gradients([batch(1, 2, 3)])
    assert model.weight.grad is not None
    assert model.weight.grad.tolist() == [[2.0]]
