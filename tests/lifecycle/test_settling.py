"""Settling: the last rounding, against a slow twin, and files that keep to their target."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from compressor.lifecycle.settling import rounded_by_length, settle
from compressor.schemes.learnt import Learnt
from compressor.sharing.code_length import CodeLength
from tests.helpers.groups import fitted

steps = st.floats(-8, 8, width=32)
bits = st.floats(0, 16, width=16)


@given(arrays(np.float32, st.integers(0, 30), elements=steps), arrays(np.float64, 9, elements=bits), st.floats(-1, 1))
@settings(max_examples=200, deadline=None)
def test_no_other_number_costs_less(weights: np.ndarray, code: np.ndarray, weight: float) -> None:
    found = rounded_by_length(torch.from_numpy(weights), torch.from_numpy(code), -4, weight)
    for value, number in zip(weights.tolist(), found.tolist(), strict=True):
        costs = {n: (value - n) ** 2 + weight * code[n + 4] for n in range(-4, 5)}
        assert costs[number] == pytest.approx(min(costs.values()), abs=1e-4)


def test_a_bit_of_no_weight_is_plain_rounding() -> None:
    weights = torch.linspace(-3.4, 3.4, 1000)
    assert torch.equal(rounded_by_length(weights, torch.rand(9) * 9, -4, 0.0), weights.round().int())


def trained(rate: float = 1e-3) -> CodeLength:
    torch.manual_seed(0)
    return CodeLength(fitted(Learnt(rate=rate), torch.randn(100, 100)))


def size_of(length: CodeLength) -> Callable[[], int]:
    """Returns the order-0 bytes, and a header of 100 bytes."""

    def size() -> int:
        length.count()
        return round(100 + length.bits / 8)

    return size


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.97, 0.999])
def test_a_file_that_is_too_large_becomes_as_large_as_the_target(share: float) -> None:
    length = trained()
    size = size_of(length)
    target = round(share * size())
    found = settle([length], target, size(), size)
    assert found == size()
    assert 0.98 * target <= found <= target


@pytest.mark.parametrize("share", [0.9, 0.97, 0.999])
def test_few_files_are_packed_before_one_is_near_the_target(share: float) -> None:
    """Each takes seconds where the model is large."""
    length, packed = trained(), 0
    size = size_of(length)

    def counted() -> int:
        nonlocal packed
        packed += 1
        return size()

    settle([length], round(share * size()), size(), counted)
    assert packed <= 3


@pytest.mark.parametrize("factor", [1.0, 1.01, 1.5])
def test_a_file_that_is_small_enough_stays_as_it_is(factor: float) -> None:
    length = trained()
    before, size = length.master.clone(), size_of(length)
    assert settle([length], round(factor * size()), size(), size) == size()
    assert torch.equal(length.master, before)


def test_below_what_one_value_takes_all_weights_have_one() -> None:
    length = trained()
    size = size_of(length)
    assert settle([length], 99, size(), size) == 100
    assert len(length.master.unique()) == 1


def test_the_cheapest_errors_come_first() -> None:
    """Weights that lie between two codewords are moved before those that lie on one, and towards zero."""
    length = trained(rate=0.3)
    before, size = length.master.clone(), size_of(length)
    settle([length], round(0.95 * size()), size(), size)
    old, new = ((weights / length.grid[1]).round() for weights in (before, length.master))
    changed = old != new
    distance = (before / length.grid[1] - old).abs()
    assert 0 < changed.float().mean() < 0.05
    assert distance[changed].min() > 0.4
    assert (new[changed].abs() < old[changed].abs()).all()
