"""The weights that a layer is to have where the layers before it have been compressed, against least squares."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from tests.helpers.calibrators import calibrator


def test_the_target_is_the_regression_of_dense_outputs_on_present_inputs() -> None:
    """Damped by a tenth of the mean of the sum of squared inputs, towards the dense weights."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    inputs = torch.randn(50, 3)
    dense, coarse = model[0].weight.detach().clone(), model[0].weight.detach().round()
    with torch.no_grad():
        before = model[:2](inputs).double()
        weight = model[2].weight.double()
        one = calibrator(model, inputs)
        found = {site.name: one.measure([site], {"0.weight": coarse})[site] for site in one.in_order()}
        model[0].weight.copy_(coarse)
        present = model[:2](inputs).double()
    damping = math.sqrt(0.1 * float(present.square().sum()) / 4)
    left = torch.cat([present, damping * torch.eye(4)])
    right = torch.cat([before @ weight.T, damping * weight.T])
    target = found["2.weight"].target
    assert target is not None
    torch.testing.assert_close(target, torch.linalg.lstsq(left, right).solution.T.float(), rtol=1e-4, atol=1e-5)
    first = found["0.weight"].target  # its inputs are what they were
    assert first is not None
    torch.testing.assert_close(first, dense)
    errors = [float((present @ one.double().T - before @ weight.T).square().sum()) for one in (target, weight)]
    assert errors[0] < errors[1]


def test_the_target_undoes_what_the_layer_before_has_lost() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    inputs = torch.randn(200, 4)
    one = calibrator(model, inputs)
    last = one.in_order()[1]
    target = one.measure([last], {"0.weight": 0.5 * model[0].weight.detach()})[last].target
    assert target is not None
    with torch.no_grad():
        dense = model(inputs)
        hidden = 0.5 * model[0](inputs)
        errors = [float((hidden @ weight.T - dense).square().sum()) for weight in (target, model[1].weight)]
    assert errors[0] < errors[1] / 4


def test_of_layers_measured_together_the_first_alone_makes_up_for_what_was_lost() -> None:
    model: Any = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])
    one = calibrator(model, torch.randn(50, 4))
    lost = {"0.weight": 0.5 * model[0].weight.detach()}
    found = one.measure(one.in_order()[1:], lost)
    assert [curvature.target is None for curvature in found.values()] == [False, True]
