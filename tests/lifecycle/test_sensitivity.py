"""Sensitivity: one tensor at a time, at several prices, predicted by curvature and measured."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from compressor.formats.errors import UsageError
from compressor.lifecycle.sensitivity import sensitivity
from compressor.sharing.curvature import Curvature, LayerView


def images() -> Tensor:
    return torch.randn(512, 6, generator=torch.Generator().manual_seed(1))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 8))


def test_prediction_and_measurement_agree_where_steps_are_fine() -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = list(sensitivity(model, images(), rates=[1e-6]))
    assert [row.site for row in rows] == ["0.weight", "2.weight"]
    assert [row.shape for row in rows] == [(24, 6), (8, 24)]
    for row in rows:
        assert 0.3 < row.measured / row.predicted < 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_higher_price_loses_more_and_takes_fewer_bits() -> None:
    rows = [row for row in sensitivity(network(), images(), rates=[1e-6, 1e-5, 1e-4]) if row.site == "2.weight"]
    assert rows[0].bits > rows[1].bits > rows[2].bits
    assert rows[0].measured < rows[1].measured < rows[2].measured
    assert rows[1].step / rows[0].step == pytest.approx(math.sqrt(10), rel=1e-5)


def test_prices_that_are_none_are_refused() -> None:
    with pytest.raises(UsageError, match="above 0 and at most 1, got 0"):
        next(sensitivity(network(), images(), rates=[0]))


def test_loss_of_errors_by_hand() -> None:
    """Two outputs with squared gradients 2 and 3, and inputs whose moments are [[1, 0.5], [0.5, 4]]."""
    moment = torch.tensor([[[1.0, 0.5], [0.5, 4.0]]])
    diagonal = torch.tensor([[2.0, 8.0], [3.0, 12.0]])
    errors = torch.tensor([[1.0, 1.0], [0.0, 2.0]])
    # 1/2 (2 (1 + 2 * 0.5 + 4) + 3 (4 * 4))
    assert Curvature(diagonal, LayerView((2, 2)), [moment]).loss(errors) == pytest.approx(30.0)
    assert Curvature(diagonal).loss(errors) == pytest.approx((2 + 8 + 48) / 2)
