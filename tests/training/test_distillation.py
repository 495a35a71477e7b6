"""The loss of distillation, by numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compressor.training.distillation import distillation, frozen_copy, with_distillation

LN3 = 1.0986122886681098


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.130812), (2.0, 0.523248), (4.0, 2.092992)])
def test_the_temperature_is_squared(temperature: float, expected: float) -> None:
    """Softmax of (ln 3, 0) is (3/4, 1/4): KL = 3/4 ln(3/2) + 1/4 ln(1/2) = 0.130812, whatever T, times T^2."""
    teacher = torch.tensor([[temperature * LN3, 0.0]])
    assert float(distillation(torch.zeros(1, 2), teacher, temperature)) == pytest.approx(expected, abs=1e-5)


def test_it_is_the_mean_over_the_batch() -> None:
    teacher = torch.tensor([[LN3, 0.0], [0.0, 0.0]])
    assert float(distillation(torch.zeros(2, 2), teacher, 1.0)) == pytest.approx(0.130812 / 2, abs=1e-6)


def test_it_is_the_divergence_from_the_teacher() -> None:
    """The other way round KL = 1/2 ln(2/3) + 1/2 ln 2 = 0.143841."""
    assert float(distillation(torch.tensor([[LN3, 0.0]]), torch.zeros(1, 2), 1.0)) == pytest.approx(0.143841, abs=1e-5)


class Sure(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return torch.tensor([[LN3, 0.0]]).expand(len(inputs), 2)


@pytest.mark.parametrize(("weight", "expected"), [(0.0, 8.0), (0.25, 6.032703), (1.0, 0.130812)])
def test_it_is_weighed_against_the_task(weight: float, expected: float) -> None:
    loss = with_distillation(torch.tensor(8.0), torch.zeros(1, 2), torch.zeros(1, 3), Sure(), weight, 1.0)
    assert float(loss) == pytest.approx(expected, abs=1e-5)


def test_a_frozen_copy_is_a_copy_in_eval_mode_without_gradients() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    frozen = frozen_copy(model)
    assert not frozen.training
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
