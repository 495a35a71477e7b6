"""Settling: the last rounding, against a slow twin, and files that keep to their target."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from compressor.lifecycle.settling import settle, shorter
from compressor.schemes.learnt import Learnt
from compressor.sharing.code_length import CodeLength
from tests.helpers.groups import fitted

steps = st.floats(-8, 8, width=32)
bits = st.floats(0, 16, width=16)
vectors = st.integers(0, 30).flatmap(
    lambda n: st.tuples(
        arrays(np.float32, n, elements=steps), arrays(np.float32, n, elements=st.floats(0, 9, width=16))
    )
)


@given(vectors, arrays(np.float64, 19, elements=bits), st.floats(0, 4))
@settings(max_examples=200, deadline=None)
def test_neither_the_next_number_nor_that_of_the_shortest_code_costs_less(
    pair: tuple[np.ndarray, np.ndarray], code: np.ndarray, price: float
) -> None:
    weights, costs = pair
    found = shorter(torch.from_numpy(weights), torch.from_numpy(costs), torch.from_numpy(code), -9, price)
    for weight, cost, number in zip(weights.tolist(), costs.tolist(), found.tolist(), strict=True):
        nearest = round(weight)
        seen_at = nearest + 0.1 * (weight - nearest)
        options = {nearest, nearest - (nearest > 0) + (nearest < 0), int(code.argmin()) - 9}
        totals = {n: cost * (seen_at - n) ** 2 + price * code[n + 9] for n in options}
        assert totals[int(number)] == pytest.approx(min(totals.values()), abs=1e-3)


@pytest.mark.parametrize("reached", [0, 10, 40, 70])
def test_weights_of_no_curvature_are_not_moved_all_at_once(reached: int) -> None:
    """No calibration image may have reached them; the file would be a fraction of the target."""
    length = trained()
    size = size_of(length)
    target = round(0.9 * size())

    def curvature(_: str) -> torch.Tensor:
        return random_curvature("") * (torch.arange(100) < reached)

    assert 0.99 * target <= settle([length], target, size(), size, curvature) <= target


def test_a_bit_of_no_price_is_plain_rounding() -> None:
    weights = torch.linspace(-3.4, 3.4, 1000)
    assert torch.equal(shorter(weights, torch.ones(()), torch.rand(9) * 9, -4, 0.0), weights.round())


def random_curvature(_: str) -> torch.Tensor:
    return torch.rand(100, 100, generator=torch.Generator().manual_seed(1)) ** 4


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
    assert 0.995 * target <= found <= target


@pytest.mark.parametrize(("share", "most"), [(0.9, 7), (0.97, 5), (0.999, 3)])
def test_few_files_are_packed_before_one_is_within_a_500th_of_the_target(share: float, most: int) -> None:
    """Each takes seconds where the model is large."""
    length, packed = trained(), 0
    size = size_of(length)

    def counted() -> int:
        nonlocal packed
        packed += 1
        return size()

    settle([length], round(share * size()), size(), counted, random_curvature)
    assert packed <= most


@pytest.mark.parametrize("share", [0.5, 0.9, 0.97])
def test_where_bytes_jump_past_the_target_the_file_is_below_it(share: float) -> None:
    """No price then has the last 500th, and none is looked for in vain until all passes are used."""
    length, sizes = trained(), []
    size = size_of(length)
    target = round(share * size())

    def jumping() -> int:
        found = size()
        sizes.append(found + 100 if found > 0.99 * target else found - 100)
        return sizes[-1]

    assert settle([length], target, jumping(), jumping) == sizes[-1]
    assert sizes[-1] == max(one for one in sizes if one <= target)
    assert len(sizes) <= 20


@pytest.mark.parametrize("factor", [1.0, 1.01, 1.5])
def test_a_file_that_is_small_enough_stays_as_it_is(factor: float) -> None:
    length = trained()
    before, size = length.master.clone(), size_of(length)
    assert settle([length], round(factor * size()), size(), size) == size()
    assert torch.equal(length.master, before)


def test_where_all_weights_are_frozen_the_file_stays_as_large_as_it_is() -> None:
    assert settle([], 99, 100, lambda: 100) == 100


def test_below_what_one_value_takes_all_weights_have_one() -> None:
    length = trained()
    size = size_of(length)
    assert settle([length], 99, size(), size) == 100
    assert len(length.master.unique()) == 1


def test_the_cheapest_errors_come_first() -> None:
    """Weights of little curvature are moved before others, wherever they lie between codewords, and towards zero."""
    length = trained(rate=0.3)
    curvature = random_curvature("")
    before, size = length.master.clone(), size_of(length)
    settle([length], round(0.95 * size()), size(), size, random_curvature)
    old, new = ((weights / length.grid[1]).round() for weights in (before, length.master))
    changed = old != new
    assert 0 < changed.float().mean() < 0.05
    assert (new[changed].abs() < old[changed].abs()).all()
    ones = old.abs() == 1
    assert curvature[changed & ones].max() < curvature[~changed & ones].quantile(0.2)


def test_of_errors_that_cost_the_same_the_nearest_to_a_border_come_first() -> None:
    length = trained(rate=0.3)
    before, size = length.master.clone(), size_of(length)
    settle([length], round(0.97 * size()), size(), size)
    old, new = ((weights / length.grid[1]).round() for weights in (before, length.master))
    changed, ones = old != new, old == 1
    reach = (before / length.grid[1]).abs()
    assert changed.any()
    assert reach[changed & ones].max() <= reach[~changed & ones].min()
