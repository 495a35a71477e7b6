"""The one-dimensional k-means against brute force, and its reproducibility."""

from __future__ import annotations

import itertools
import tracemalloc
from typing import Any

import kmeans1d
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.clustering.kmeans1d import optimal_codebook, spread


def error(weights: np.ndarray, codebook: np.ndarray, importance: np.ndarray | None = None) -> float:
    squared = (weights[:, None].astype(np.float64) - codebook[None, :].astype(np.float64)) ** 2
    return float((squared.min(axis=1) * (1 if importance is None else importance)).sum())


def nearest_error(weights: np.ndarray, codebook: np.ndarray) -> float:
    """``error`` without its n x K matrix."""
    wide = codebook.astype(np.float64)
    nearest = wide[np.searchsorted((wide[1:] + wide[:-1]) / 2, weights)]
    return float(((weights.astype(np.float64) - nearest) ** 2).sum())


def brute_force(weights: np.ndarray, codewords: int, importance: np.ndarray) -> float:
    """The least error over every way of cutting the sorted weights into runs."""
    order = np.argsort(weights)
    values, mass = weights[order].astype(np.float64), importance[order]
    best = np.inf
    for cuts in itertools.combinations(range(1, len(values)), codewords - 1):
        borders = [0, *cuts, len(values)]
        runs = [slice(a, b) for a, b in itertools.pairwise(borders)]
        means = [np.average(values[run], weights=mass[run]) for run in runs]
        total = sum((mass[run] * (values[run] - mean) ** 2).sum() for run, mean in zip(runs, means, strict=True))
        best = min(best, total)
    return best


@given(
    st.lists(st.integers(-50, 50), min_size=5, max_size=11, unique=True), st.integers(1, 4), st.integers(0, 2**32 - 1)
)
@settings(max_examples=60, deadline=None)
def test_optimal_on_small_sets(values: list[int], codewords: int, seed: int) -> None:
    weights = np.array(values, dtype=np.float32)
    even = np.ones(len(weights))
    assert (
        error(weights, optimal_codebook(weights, codewords))
        <= brute_force(weights, codewords, even) * (1 + 1e-5) + 1e-3
    )
    importance = np.random.default_rng(seed).uniform(0.5, 2.0, len(weights))
    found = optimal_codebook(weights, codewords, importance)
    assert error(weights, found, importance) <= brute_force(weights, codewords, importance) * 1.02 + 1e-3


SHAPES: dict[str, Any] = {
    "normal": lambda rng, n: rng.normal(size=n),
    "laplace": lambda rng, n: rng.laplace(size=n),
    "student": lambda rng, n: rng.standard_t(4, size=n),
    "uniform": lambda rng, n: rng.uniform(size=n),
    "bimodal": lambda rng, n: np.concatenate([rng.normal(-3, 1, n // 2), rng.normal(3, 0.2, n - n // 2)]),
    "offset": lambda rng, n: 100 + 0.005 * rng.normal(size=n),
    "negative": lambda rng, n: -rng.exponential(size=n),
    "sparse": lambda rng, n: rng.normal(size=n) * (rng.uniform(size=n) < 0.1),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("count", "codewords"), [(300, 4), (300, 64), (4_000, 3), (4_000, 16), (40_000, 2), (40_000, 16), (40_000, 64)]
)
def test_within_a_ten_thousandth_of_the_optimum(shape: str, count: int, codewords: int) -> None:
    """That of a library for which speed is no object; what rounding codewords to float32 costs comes on top."""
    weights = np.sort(SHAPES[shape](np.random.default_rng(codewords), count).astype(np.float32))
    found = optimal_codebook(weights, codewords)
    optimum = np.array(kmeans1d.cluster(weights.astype(np.float64), codewords).centroids)
    rounding = count * (np.spacing(np.abs(weights).max()) / 2) ** 2
    assert nearest_error(weights, found) <= nearest_error(weights, optimum) * 1.0001 + rounding


def test_every_centre_is_the_mean_of_its_members() -> None:
    weights = np.random.default_rng(1).standard_t(4, 20_000).astype(np.float32)
    codebook = optimal_codebook(weights, 16)
    nearest = np.abs(weights[:, None] - codebook[None, :]).argmin(axis=1)
    means = [weights[nearest == k].astype(np.float64).mean() for k in range(16)]
    np.testing.assert_allclose(codebook, means, rtol=1e-3, atol=1e-4)


def test_few_distinct_values_come_back_as_they_are() -> None:
    weights = np.array([3.0, -1.0, 3.0, 0.5] * 10, dtype=np.float32)
    assert optimal_codebook(weights, 8).tolist() == [-1.0, 0.5, 3.0]
    assert optimal_codebook(weights, 3).tolist() == [-1.0, 0.5, 3.0]


@given(st.permutations(list(range(50))))
@settings(max_examples=20, deadline=None)
def test_the_order_of_the_weights_does_not_matter(order: list[int]) -> None:
    weights = np.random.default_rng(2).normal(size=50).astype(np.float32)
    assert optimal_codebook(weights[order], 5).tobytes() == optimal_codebook(weights, 5).tobytes()


def test_importance_draws_codewords() -> None:
    weights = np.linspace(0, 1, 1001, dtype=np.float32)
    upper = np.where(weights > 0.5, 100.0, 1.0)
    assert (optimal_codebook(weights, 8, upper) > 0.5).sum() > 5
    assert len(optimal_codebook(weights, 8, np.zeros(1001))) == 8


@pytest.mark.parametrize("init", ["linear", "density", "quantile"])
@pytest.mark.parametrize("shape", SHAPES)
def test_other_starts_end_where_every_centre_is_a_mean_and_no_better_than_the_optimum(init: Any, shape: str) -> None:
    weights = SHAPES[shape](np.random.default_rng(0), 5000).astype(np.float32)
    found = optimal_codebook(weights, 8, init=init)
    assert len(found) <= 8
    nearest = np.abs(weights[:, None] - found).argmin(1)
    means = [weights[nearest == k].mean(dtype=np.float64) for k in range(len(found))]
    np.testing.assert_allclose(found, means, rtol=2e-3, atol=1e-3 * weights.std())
    assert error(weights, found) >= error(weights, optimal_codebook(weights, 8)) * 0.9999


def test_a_linear_start_stops_early_on_heavy_tails() -> None:
    """What Deep Compression starts from, against the optimum: the reason for the default."""
    weights = np.random.default_rng(0).standard_t(4, 50_000).astype(np.float32)
    assert error(weights, optimal_codebook(weights, 16, init="linear")) > 1.05 * error(
        weights, optimal_codebook(weights, 16)
    )


@pytest.mark.parametrize("weighed", [False, True])
def test_a_huge_tensor_is_seen_in_runs(monkeypatch: pytest.MonkeyPatch, weighed: bool) -> None:
    """Its codebook is as good as the one for all its weights, within a thousandth."""
    random = np.random.default_rng(0)
    weights = random.normal(size=40_001).astype(np.float32)
    importance = random.random(40_001).astype(np.float32) if weighed else None

    exact = error(weights, optimal_codebook(weights, 16, importance), importance)
    monkeypatch.setattr("compressor.clustering.kmeans1d.MAX_WEIGHTS", 3_000)
    found = error(weights, optimal_codebook(weights, 16, importance), importance)
    assert found == pytest.approx(exact, rel=1e-3)
    assert optimal_codebook(np.repeat(np.array([0.5, -1, 2], np.float32), 5_000), 16).tolist() == [-1, 0.5, 2]


def test_starts_are_where_they_are_said_to_be() -> None:
    """A quantile start takes 0, 6 and 7, the middles of three shares, and ends at the means of {0, 3}, {6, 7}, {10}."""
    weights = np.array([0, 3, 6, 7, 10], np.float32)
    assert optimal_codebook(weights, 3, init="quantile").tolist() == [1.5, 6.5, 10.0]


@pytest.mark.parametrize("init", ["optimal", "linear", "density", "quantile"])
def test_as_many_distinct_weights_as_codewords_come_back_whatever_the_start(init: Any) -> None:
    weights = np.array([100, 0, 1, 2, 1], np.float32)
    assert optimal_codebook(weights, 4, init=init).tolist() == [0.0, 1.0, 2.0, 100.0]


def test_weights_of_no_importance_count_a_thousandth_of_the_mean() -> None:
    """(2.001 * 0.25 + 0.001 * 2.25) / 2.003 = 0.250874, for the three weights that share a value."""
    weights, importance = np.array([0, 0.25, 1, 1.25], np.float32), np.array([1, 1, 0, 0], np.float32)
    assert optimal_codebook(weights, 2, importance).tolist() == pytest.approx([0.0, 0.250874], abs=1e-6)


@pytest.mark.parametrize(("size", "expected"), [(0.7, 0.5), (0.75, 1.0), (1.4, 1.0), (1.5, 2.0), (0.0, 1.0)])
def test_the_spread_is_the_power_of_two_nearest_in_the_logarithm(size: float, expected: float) -> None:
    assert spread(torch.tensor([size, -size])) == expected
    assert spread(torch.zeros(0)) == 1.0


def test_clustering_takes_a_few_times_the_weights() -> None:
    weights = np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32)
    optimal_codebook(weights[:100_000], 16)  # what is kept for later calls
    tracemalloc.start()
    optimal_codebook(weights, 16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 28 * len(weights)
