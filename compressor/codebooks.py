"""Codebooks for weights as they stand: one-dimensional k-means, near-optimal and reproducible.

All sums are float64 prefix sums over sorted data, so the same weights give the same codebook on any machine
and any number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressor.group import Group
from compressor.sites import Site

__all__ = ["Init", "fit_codebook", "fit_codebook_of_each_slice", "optimal_codebook"]

Init = Literal["optimal", "linear", "density", "quantile"]

Floats = NDArray[np.floating[Any]]
MAX_EDGES = 513  # candidate cluster borders of the dynamic programme: K * 513^2 operations
MAX_CODEWORDS_PROGRAMMED = 256
MAX_ITERATIONS = 100
SAMPLED, SAMPLED_ENDS = 32_768, 512  # order statistics looked at, and all of so many at either end


def optimal_codebook(
    weights: Floats, codewords: int, importance: Floats | None = None, init: Init = "optimal"
) -> NDArray[np.float32]:
    """Find the K values with the least (weighted) squared error to ``weights``.

    A dynamic programme over a few hundred candidate borders finds the global shape, Lloyd's iterations finish
    it. With no more than K distinct weights those are returned, and sharing is exact.

    Args:
        weights: float[n], finite, n >= 1.
        codewords: K, at least 1.
        importance: float[n] >= 0, the weight of each squared error; None: all equal.
        init: where Lloyd's iterations start: "optimal", the dynamic programme; "linear", evenly from least to
            largest; "density", evenly along the cumulative distribution, ends included; "quantile", in the middles of
            K equal shares. The last three stop at local optima, and lose codewords that no weight is near to.

    Returns:
        float32[K'], ascending, K' <= K.

    Example:
        >>> optimal_codebook(np.array([0.0, 0.1, 1.0, 1.1]), 2).tolist()
        [0.05000000074505806, 1.0499999523162842]

    Reference: Wang, Song, "Ckmeans.1d.dp", The R Journal 3(2), 2011, for the dynamic programme.
    """
    order = np.argsort(weights, kind="stable") if importance is not None else None
    values = (weights[order] if order is not None else np.sort(weights)).astype(np.float64)
    distinct = np.flatnonzero(np.diff(values)) + 1
    if len(distinct) < codewords:
        return np.asarray(values[np.concatenate([[0], distinct])], dtype=np.float32)
    mass = np.ones_like(values) if importance is None else _positive(importance[order].astype(np.float64))
    sums = _PrefixSums(values, mass)
    centres = _start(values, sums, codewords, init)
    return np.asarray(np.unique(_lloyd(values, sums, centres).astype(np.float32)))


def _start(values: NDArray[np.float64], sums: _PrefixSums, codewords: int, init: Init) -> NDArray[np.float64]:
    """Give the centres that Lloyd's iterations start from, ascending."""
    if init == "optimal":
        return sums.means(_initial_borders(values, sums, codewords))
    if init == "linear":
        return np.linspace(values[0], values[-1], codewords)
    even = np.linspace(0, 1, codewords) if init == "density" else (np.arange(codewords) + 0.5) / codewords
    ranked: NDArray[np.float64] = values[(even * (len(values) - 1)).astype(np.int64)]
    return ranked


def fit_codebook(
    group: Group,
    codewords: int,
    importance: Mapping[Site, Tensor] | None,
    init: Init = "optimal",
    scales: Mapping[Site, float] | None = None,
) -> Tensor:
    """Find the best codebook for all weights of a group that are not pruned; float32[K'] on the group's device.

    Where weights are pruned, one of the codewords is left for zero, which ``share`` adds. With ``scales`` it is for
    each site's weights divided by its scale.
    """
    divided = scales or dict.fromkeys(group.sites, 1.0)
    weights = torch.cat([group.survivors(site).float() / divided[site] for site in group.sites])
    if group.has_zeros:
        codewords = max(1, codewords - 1)
    if not len(weights):
        return weights.new_zeros(1)
    weighing = None
    if importance is not None:
        kept = [importance[site][~group.pruned(site)] for site in group.sites]
        weighing = torch.cat([part.float() for part in kept]).cpu().numpy()
    return torch.from_numpy(optimal_codebook(weights.cpu().numpy(), codewords, weighing, init)).to(weights.device)


def fit_codebook_of_each_slice(
    group: Group, codewords: int, importance: Mapping[Site, Tensor] | None, init: Init = "optimal"
) -> Tensor:
    """Find the best codebook for the weights in each slice of axis 0 of a group's one tensor.

    Returns:
        float32[slices, K'], ascending; where a slice needs fewer codewords than others its largest is repeated.
    """
    (site,) = group.sites
    latent = group.latent(site).detach()
    rows = latent.float().reshape(len(latent), -1).cpu().numpy()
    kept = ~group.pruned(site).reshape(rows.shape).cpu().numpy()
    mass = None if importance is None else importance[site].float().reshape(rows.shape).cpu().numpy()
    if group.has_zeros:
        codewords = max(1, codewords - 1)
    found = [
        optimal_codebook(row[keep], codewords, None if mass is None else mass[number][keep], init)
        if keep.any()
        else np.zeros(1, np.float32)
        for number, (row, keep) in enumerate(zip(rows, kept, strict=True))
    ]
    most = max(map(len, found))
    filled = np.stack([np.pad(codebook, (0, most - len(codebook)), mode="edge") for codebook in found])
    return torch.from_numpy(filled).to(latent.device)


def _positive(importance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lift zero importance a little, so that every cluster has a mean; all zero means all equal."""
    mean = float(importance.mean())
    return importance / mean + 1e-3 if mean > 0 else np.ones_like(importance)


class _PrefixSums:
    """Mass, first and second moment of every run of the sorted values."""

    def __init__(self, values: NDArray[np.float64], mass: NDArray[np.float64]) -> None:
        self.centre = float(values.mean())
        shifted = values - self.centre  # or the squares cancel when the spread is small beside the mean
        self.mass, self.first, self.second = (
            np.concatenate([[0.0], np.cumsum(mass * shifted**power)]) for power in (0, 1, 2)
        )

    def means(self, borders: NDArray[np.int64]) -> NDArray[np.float64]:
        """Mean of each run between neighbouring borders; empty runs are dropped."""
        borders = np.unique(borders)
        mean: NDArray[np.float64] = np.diff(self.first[borders]) / np.diff(self.mass[borders]) + self.centre
        return mean

    def costs(self, edges: NDArray[np.int64]) -> NDArray[np.float64]:
        """Squared error of every run edges[i]..edges[j] about its mean, float64[E, E]; inf unless i < j."""
        mass, first, second = (s[edges][None, :] - s[edges][:, None] for s in (self.mass, self.first, self.second))
        with np.errstate(divide="ignore", invalid="ignore"):
            cost = np.maximum(second - first**2 / mass, 0)
        return np.where(mass > 0, cost, np.inf)


def _initial_borders(values: NDArray[np.float64], sums: _PrefixSums, codewords: int) -> NDArray[np.int64]:
    count = len(values)
    if codewords > MAX_CODEWORDS_PROGRAMMED:
        return np.linspace(0, count, codewords + 1).astype(np.int64)
    edges = _candidate_edges(values)
    cost = sums.costs(edges)
    best, choices = cost[0], []
    for _ in range(min(codewords, len(edges) - 1) - 1):
        total = best[:, None] + cost
        choice = total.argmin(axis=0)
        choices.append(choice)
        best = np.minimum(best, total[choice, np.arange(len(edges))])
        choice[best < total[choice, np.arange(len(edges))]] = -1  # one cluster fewer is as good
    return edges[_trace_back(choices, len(edges) - 1)]


def _candidate_edges(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Choose positions in the sorted values at which clusters may end, 0 and n among them.

    The best codewords lie as densely as the cube root of the values' density; of what IEEE arithmetic gives alike
    on all machines its square root comes nearest. Some lie by rank and some by value, for the odd shapes.
    """
    count = len(values)
    ends = min(SAMPLED_ENDS, count)
    inside = np.linspace(0, count - 1, SAMPLED).astype(np.int64)
    ranks = np.unique(np.concatenate([np.arange(ends), inside, np.arange(count - ends, count)]))
    spacing = np.sqrt(np.diff(ranks) * np.diff(values[ranks]))
    grown = np.concatenate([[0.0], np.cumsum(spacing)])
    by_density = ranks[np.searchsorted(grown, np.linspace(0, grown[-1], MAX_EDGES // 2))]
    by_rank = np.linspace(0, count, MAX_EDGES // 4 + 1).astype(np.int64)
    by_value = np.searchsorted(values, np.linspace(values[0], values[-1], MAX_EDGES // 4))
    return np.unique(np.concatenate([by_density, by_rank, by_value]))


def _trace_back(choices: list[NDArray[np.int64]], last: int) -> NDArray[np.int64]:
    borders = [last]
    for choice in reversed(choices):
        if choice[borders[-1]] >= 0:
            borders.append(int(choice[borders[-1]]))
    return np.array([0, *reversed(borders)], dtype=np.int64)


def _lloyd(values: NDArray[np.float64], sums: _PrefixSums, centres: NDArray[np.float64]) -> NDArray[np.float64]:
    """Alternate nearest centre and mean until the borders stand still."""
    borders = np.empty(0, dtype=np.int64)
    for _ in range(MAX_ITERATIONS):
        inner = np.searchsorted(values, (centres[1:] + centres[:-1]) / 2, side="right")
        moved = np.concatenate([[0], inner, [len(values)]])
        if np.array_equal(moved, borders):
            break
        borders = moved
        centres = sums.means(borders)
    return centres
