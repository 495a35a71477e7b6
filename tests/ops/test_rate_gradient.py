"""The slope of a code length against a slow twin, and as the gradient of what it is the slope of."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from compressor.formats.jit import cache
from compressor.ops.rate_gradient import rate_gradient, with_rate_gradient

finite = st.floats(-(2.0**20), 2.0**20, width=32)


def slow_slopes(weights: Tensor, slopes: Tensor, line: Tensor) -> Tensor:
    per_step, least = np.float32(line[0]), np.float32(line[1])
    cells = [math.floor(np.float32(np.float32(weight) * per_step) - least) for weight in weights.reshape(-1).tolist()]
    found = [slopes[min(max(cell, 0), len(slopes) - 1)] for cell in cells]
    return torch.stack(found).reshape(weights.shape) if found else torch.zeros(weights.shape)


def found_slopes(weights: Tensor, slopes: Tensor, line: Tensor) -> Tensor:
    out = torch.empty(weights.shape, dtype=weights.dtype)
    rate_gradient(weights, slopes, line, out)
    return out


@given(
    arrays(np.float32, st.integers(0, 50), elements=finite),
    arrays(np.float32, st.integers(1, 20), elements=finite),
    st.floats(2.0**-6, 2.0**6, width=32),
    st.integers(-30, 0),
)
@settings(max_examples=200, deadline=None)
def test_a_weight_has_the_slope_of_its_cell(
    weights: np.ndarray, slopes: np.ndarray, per_step: float, least: int
) -> None:
    line = torch.tensor([per_step, least])
    given_weights, given_slopes = torch.from_numpy(weights), torch.from_numpy(slopes)
    assert torch.equal(found_slopes(given_weights, given_slopes, line), slow_slopes(given_weights, given_slopes, line))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_machine_code_and_stock_operators_agree(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weights, slopes, line = torch.randn(3, 70_001).to(dtype).t(), torch.randn(40), torch.tensor([7.0, -20.0])
    found = found_slopes(weights, slopes, line)
    monkeypatch.setattr("compressor.ops.rate_gradient.compiled_kernel", lambda *_, **__: None)
    assert torch.equal(found_slopes(weights, slopes, line), found)
    assert cache.available()


def test_what_is_no_number_has_a_slope(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU takes a few steps before a loss that is not finite is noticed: they must not read beyond the slopes."""
    weights = torch.tensor([torch.nan, torch.inf, -torch.inf])
    slopes, line = torch.tensor([1.0, 2.0]), torch.tensor([1.0, -1.0])
    assert found_slopes(weights, slopes, line).tolist()[1:] == [2.0, 1.0]
    monkeypatch.setattr("compressor.ops.rate_gradient.compiled_kernel", lambda *_, **__: None)
    assert found_slopes(weights, slopes, line).tolist()[1:] == [2.0, 1.0]


def test_it_is_the_gradient_of_the_length_between_levels() -> None:
    """By finite differences, in the middle of cells."""
    torch.manual_seed(0)
    lengths, step, least = torch.rand(7, dtype=torch.float64) * 9, 0.25, -3
    places = torch.randint(0, 6, (50,)) + 0.1 + 0.8 * torch.rand(50)
    master = ((places + least) * step).float().requires_grad_()

    def total(weights: Tensor) -> float:
        exact = weights.double() / step - least
        cells = exact.floor().long()
        return float((lengths[cells] + (exact - cells) * (lengths[cells + 1] - lengths[cells])).sum())

    cost = with_rate_gradient(
        master, torch.tensor(7.0), (lengths.diff() / step).float(), torch.tensor([1 / step, float(least)])
    )
    assert cost.item() == 7.0
    (3 * cost).backward()
    assert master.grad is not None
    moves = torch.eye(50, dtype=torch.float64) * 1e-3
    exact = [(total(master.detach() + move) - total(master.detach() - move)) / 2e-3 for move in moves]
    torch.testing.assert_close(master.grad.double(), 3 * torch.tensor(exact).double(), rtol=1e-3, atol=1e-3)


def test_the_gradient_of_the_network_is_added_to_it() -> None:
    master = torch.tensor([0.3, -0.3], requires_grad=True)
    cost = with_rate_gradient(master, torch.tensor(0.0), torch.tensor([-2.0, 2.0]), torch.tensor([1.0, -1.0]))
    (5 * master.sum() + cost).backward()
    assert master.grad is not None
    assert master.grad.tolist() == [7.0, 3.0]
