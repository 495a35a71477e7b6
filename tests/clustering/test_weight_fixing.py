"""Clustering by relative distance, against the published counts and against brute force."""

from __future__ import annotations

import itertools
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from compressor.clustering.sorted_runs import SortedRuns, sort_order
from compressor.clustering.weight_fixing import candidates, fix, nearest_window

Floats = NDArray[np.floating[Any]]

COUNTS = {
    0.0075: [17, 125, 393, 561, 621],
    0.01: [17, 119, 337, 441, 479],
    0.015: [17, 107, 265, 311, 325],
    0.05: [17, 81, 99, 99, 99],
    0.075: [17, 63, 67, 67, 67],
}


@pytest.mark.parametrize("tolerance", COUNTS)
def test_counts_of_candidates_are_those_of_the_authors_code(tolerance: float) -> None:
    found = [len(candidates(1.0, 2**-7, tolerance, order)) for order in range(5)]
    assert found == COUNTS[tolerance]


@pytest.mark.parametrize("order", range(4))
def test_candidates_are_sums_of_few_powers_of_two(order: int) -> None:
    powers = [sign * 2.0**exponent for exponent in range(-8 - order, 2) for sign in (-1, 1)]
    sums = {0.0} | {sum(terms) for n in range(1, order + 2) for terms in itertools.combinations(powers, n)}
    grid = candidates(1.0, 2**-7, 0.01, order)
    assert set(grid.tolist()) <= sums
    assert np.array_equal(grid, -grid[::-1])


def test_no_weight_is_further_from_the_unrounded_grid_than_the_tolerance() -> None:
    grid = candidates(1.0, 2**-7, 0.01, order=30)  # so many terms that rounding stops at the tolerance
    weights = np.linspace(2**-7, 0.98, 20_001)
    nearest = grid[np.abs(weights[:, None] - grid).argmin(1)]
    assert (np.abs(weights - nearest) / weights).max() <= 0.02 + 1e-6  # of the grid, and of the rounding


@pytest.mark.parametrize(("worst", "order"), [(0.414, 0), (0.249, 1), (0.111, 2), (0.062, 3), (0.030, 4)])
def test_rounding_to_few_powers_of_two_has_the_known_worst_error(worst: float, order: int) -> None:
    tolerance = 1e-4
    targets = 2.0**-7 * ((1 + tolerance) / (1 - tolerance)) ** np.arange(30_000)
    targets = targets[targets < 1]
    grid = candidates(1.0, 2**-7, tolerance, order)
    error = np.abs(grid[:, None] - targets[::97]).min(0) / targets[::97]
    assert worst / 3 < error.max() <= worst + 1e-3


def test_all_of_one_size_still_has_a_candidate() -> None:
    assert candidates(0.25, 0.25, 0.1, 0).tolist() == [-0.25, 0.0, 0.25]


def brute_force(left: Floats, codeword: float, tolerance: float, wanted: int) -> Floats:
    """The paper's words: sort all distances, drop the zeros from the mean, take the longest prefix."""
    same = left[np.sign(left) == np.sign(codeword)].astype(np.float64)
    distance = np.abs(same - codeword) / np.abs(same)
    order = np.argsort(distance, kind="stable")
    taken, nonzero = 0, []
    for distance_now in distance[order]:
        nonzero += [distance_now] if distance_now > 0 else []
        if taken == wanted or np.sum(nonzero) > tolerance * len(nonzero):
            break
        taken += 1
    chosen: Floats = np.sort(same[order[:taken]])
    return chosen


@pytest.mark.parametrize("seed", range(40))
def test_window_is_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = (rng.standard_normal(700) * 10.0 ** rng.integers(-2, 1, 700)).astype(np.float32)
    weights[::7] = np.round(weights[::7], 1) + np.float32(0.01)  # equal ones
    weights = weights[weights != 0]
    remaining = SortedRuns(np.sort(weights))
    for codeword in rng.choice(weights, 12):
        tolerance, wanted = float(rng.uniform(0.001, 0.4)), int(rng.integers(1, 300))
        left = remaining.between(0, len(remaining))
        first, last = nearest_window(remaining, float(codeword), tolerance, wanted)
        expected = brute_force(left, float(codeword), tolerance, wanted)
        assert np.array_equal(remaining.between(first, last), expected)
        if first < last:
            remaining.take(first, last)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(-40, 40).filter(bool), min_size=1, max_size=60),
    st.sampled_from([-32.0, -4.0, -1.0, 1.0, 3.0, 8.0]),
    st.sampled_from([0.01, 0.125, 0.25, 0.5]),
    st.integers(1, 70),
)
def test_window_is_brute_force_among_ties(whole: list[int], codeword: float, tolerance: float, wanted: int) -> None:
    weights = np.sort(np.array(whole, dtype=np.float32))
    remaining = SortedRuns(weights)
    first, last = nearest_window(remaining, codeword, tolerance, wanted)
    assert np.array_equal(remaining.between(first, last), brute_force(weights, codeword, tolerance, wanted))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_what_remains_is_counted_right(data: st.DataObject) -> None:
    values = np.arange(1, 51, dtype=np.float32)
    remaining, left = SortedRuns(values), np.ones(50, dtype=bool)
    while left.any():
        kept = values[left]
        assert len(remaining) == len(kept)
        assert remaining.largest() == kept[-1]
        assert np.array_equal(remaining.between(0, len(kept)), kept)
        positions = np.arange(51)
        assert np.array_equal(remaining.rank(positions), np.concatenate([[0], np.cumsum(left)]))
        first = data.draw(st.integers(0, len(kept) - 1))
        last = data.draw(st.integers(first + 1, len(kept)))
        for start, stop in remaining.take(first, last):
            assert left[start:stop].all()
            left[start:stop] = False
        assert np.array_equal(values[left], np.delete(kept, slice(first, last)))


def brute_force_fix(weights: Floats, wanted: int, tolerance: float, smallest: float) -> tuple[list[float], Floats]:
    """The whole algorithm with a table of weights by candidates; gives codewords, and fixed weights or NaN."""
    fixed = np.full(len(weights), np.nan)
    used, order = [], 0
    exact = weights.astype(np.float64)
    while (taken := int(np.isfinite(fixed).sum())) < wanted:
        free = np.isnan(fixed)
        grid = candidates(float(np.abs(exact[free]).max()), smallest, tolerance, order)
        table = np.abs(exact[free][:, None] - grid[None, :])
        codeword = float(grid[np.bincount(table.argmin(1), minlength=len(grid)).argmax()])
        distance = np.where(free, np.abs(exact - codeword) / np.abs(exact), np.inf)
        ascending = np.argsort(distance, kind="stable")[: wanted - taken]
        means = np.cumsum(distance[ascending]) / np.maximum(np.cumsum(distance[ascending] > 0), 1)
        accepted = ascending[means <= tolerance]
        if not len(accepted):
            order += 1
            assert order <= 20
            continue
        fixed[accepted] = codeword
        used.append(codeword)
    return used, fixed


@pytest.mark.parametrize("seed", range(12))
def test_fixing_is_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal(600).astype(np.float32)
    weights = weights[np.abs(weights) > 2**-4]
    wanted, tolerance = int(len(weights) * rng.uniform(0.2, 0.8)), float(rng.uniform(0.01, 0.1))
    codewords, chosen = fix(weights, wanted, tolerance, 2**-4)
    used, fixed = brute_force_fix(weights, wanted, tolerance, 2**-4)
    assert codewords.tolist() == used
    assert np.array_equal(np.where(chosen < 0, np.nan, codewords[chosen]), fixed, equal_nan=True)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False).filter(bool), min_size=1, max_size=80),
    st.floats(0.001, 0.75),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_any_weights_are_fixed_in_the_end(weights: list[float], tolerance: float, dtype: torch.dtype) -> None:
    exact = torch.tensor(weights).to(dtype).float()
    given_weights = exact[torch.isfinite(exact) & (exact != 0)].numpy()
    if not len(given_weights):
        return
    codewords, chosen = fix(given_weights, len(given_weights), tolerance, float(np.abs(given_weights).min()), dtype)
    assert (chosen >= 0).all()
    assert np.isfinite(codewords).all()
    assert np.array_equal(torch.from_numpy(codewords).to(dtype).float().numpy(), codewords)
    assert (np.sign(codewords[chosen]) == np.sign(given_weights)).all()


def test_clusters_are_within_the_tolerance_and_could_not_take_more() -> None:
    weights = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    weights = weights[np.abs(weights) > 0.25]
    tolerance = 0.03
    codewords, chosen = fix(weights, int(0.9 * len(weights)), tolerance, 0.25)
    assert int((chosen >= 0).sum()) == int(0.9 * len(weights))
    exact = weights.astype(np.float64)
    for number in range(len(codewords) - 1):  # the last may have been cut short
        codeword = float(codewords[number])
        distance = np.abs(exact - codeword) / np.abs(exact)
        inside, later = distance[chosen == number], distance[(chosen > number) | (chosen < 0)]
        assert inside.mean() <= tolerance + 1e-12
        assert np.append(inside, later.min()).mean() > tolerance


def test_equal_weights_cost_one_codeword() -> None:
    codewords, chosen = fix(np.full(1000, 0.75, dtype=np.float32), 1000, 0.01, 0.25)
    assert codewords.tolist() == [0.75]
    assert (chosen == 0).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False).filter(bool), max_size=50))
def test_sorting_by_packed_keys(weights: list[float]) -> None:
    given_weights = np.array(weights, dtype=np.float32)
    values, order = sort_order(given_weights)
    assert np.array_equal(order, np.argsort(given_weights, kind="stable"))
    assert np.array_equal(values, given_weights[order])


def test_no_table_of_weights_by_candidates() -> None:
    """With 300 times the candidates the memory stays that of the weights."""
    weights = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    weights = weights[np.abs(weights) > 2**-7]
    assert len(candidates(4.0, 2**-7, 0.01, 3)) > 500
    tracemalloc.start()
    fix(weights, len(weights), 0.01, 2**-7)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * len(weights)


def test_reads_each_weight_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read outwards from the codewords is in proportion to what is taken, however many weights there are."""
    read = 0
    between = SortedRuns.between

    def counted(self: SortedRuns, first: int, last: int) -> Floats:
        nonlocal read
        read += last - first
        return between(self, first, last)

    monkeypatch.setattr(SortedRuns, "between", counted)
    per_weight = []
    for count in (20_000, 320_000):
        read = 0
        weights = np.random.default_rng(0).standard_normal(count).astype(np.float32)
        weights = weights[np.abs(weights) > 0.25]
        codewords, _ = fix(weights, len(weights), 0.02, 0.25)
        per_weight.append((read - 2 * 256 * len(codewords)) / len(weights))
    assert max(per_weight) < 8
