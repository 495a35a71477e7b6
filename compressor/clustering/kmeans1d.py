"""Codebooks for given weights: one-dimensional k-means, near-optimal and reproducible.

All sums are float64 prefix sums over sorted data, so the same weights give the same codebook on any machine and with
any number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressor.clustering.dynamic_program import PrefixSums, initial_borders, refine_borders
from compressor.sharing.group_state import GroupState
from compressor.sharing.sites import Site

__all__ = ["Init", "fit_codebook", "fit_codebook_of_each_row", "optimal_codebook", "spread"]

Init = Literal["optimal", "linear", "density", "quantile"]

Floats = NDArray[np.floating[Any]]
MAX_ITERATIONS = 100
MAX_WEIGHTS = 1 << 24  # weights clustered one by one: the sums of the dynamic program take 28 bytes for each


def optimal_codebook(
    weights: Floats, codewords: int, importance: Floats | None = None, init: Init = "optimal"
) -> NDArray[np.float32]:
    """Returns the K values with the least (weighted) squared error to ``weights``.

    A dynamic program over candidate borders finds the global shape; further ones over windows about these borders then
    move them to the optimum. With no more than K distinct weights, those are returned and sharing is exact. More than
    2^24 weights are replaced by the means of short runs of neighbours.

    Args:
        weights: float[n], finite, n >= 1.
        codewords: K, at least 1.
        importance: float[n] >= 0, the weight of each squared error; None: all equal.
        init: "optimal", the dynamic program; or where Lloyd's iterations start: "linear", evenly from the least to the
            largest weight; "density", evenly along the cumulative distribution, ends included; "quantile", in the
            middles of K equal shares. These three stop at local optima and lose codewords that no weight is nearest to.

    Returns:
        float32[K'], ascending, K' <= K.

    Example:
        >>> optimal_codebook(np.array([0.0, 0.1, 1.0, 1.1]), 2).tolist()
        [0.05000000074505806, 1.0499999523162842]

    Reference: Wang, Song, "Ckmeans.1d.dp", The R Journal 3(2), 2011, for the dynamic programme.
    """
    order = None if importance is None else np.argsort(weights, kind="stable")
    ranked = np.sort(weights) if order is None else weights[order]
    first = np.concatenate([[True], ranked[1:] != ranked[:-1]])
    if np.count_nonzero(first) <= codewords:
        return np.asarray(ranked[first], dtype=np.float32)
    values, mass = _merge_runs(ranked, None if order is None or importance is None else importance[order])
    del order, ranked, first  # as large as the weights, whose sums are six times as large
    sums = PrefixSums(values, mass)
    centres = _initial_centres(values, sums, codewords, init)
    return np.asarray(np.unique(_lloyd(values, sums, centres).astype(np.float32)))


def _merge_runs(ranked: Floats, importance: Floats | None) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """Returns sorted weights and their importance, float64[n] both, the latter None where it is 1 for all.

    Above MAX_WEIGHTS, they are means and sums of short runs.
    """
    step = -(-len(ranked) // MAX_WEIGHTS)
    mass = None if importance is None else _positive(importance.astype(np.float64))
    if step == 1:
        return ranked.astype(np.float64), mass
    starts = np.arange(0, len(ranked), step)
    total = np.diff(starts, append=len(ranked)).astype(np.float64) if mass is None else np.add.reduceat(mass, starts)
    weighted = ranked if mass is None else ranked * mass
    return np.add.reduceat(weighted, starts, dtype=np.float64) / total, total


def _initial_centres(values: NDArray[np.float64], sums: PrefixSums, codewords: int, init: Init) -> NDArray[np.float64]:
    """Returns the centres that Lloyd's iterations start from, ascending."""
    if init == "optimal":
        return sums.means(refine_borders(sums, np.unique(initial_borders(values, sums, codewords))))
    if init == "linear":
        return np.linspace(values[0], values[-1], codewords)
    even = np.linspace(0, 1, codewords) if init == "density" else (np.arange(codewords) + 0.5) / codewords
    ranked: NDArray[np.float64] = values[(even * (len(values) - 1)).astype(np.int64)]
    return ranked


def fit_codebook(
    group: GroupState,
    codewords: int,
    importance: Mapping[Site, Tensor] | None,
    init: Init = "optimal",
    factors: Mapping[Site, Tensor] | None = None,
) -> Tensor:
    """Returns the best codebook for all weights of a group that are not pruned.

    Args:
        group: the tensors that share the codebook.
        codewords: K; if weights are pruned, one codeword is reserved for the zero that ``export`` adds.
        importance: the weight of each squared error of a weight, by tensor; None: errors of codewords are all equal.
        init: as in ``optimal_codebook``.
        factors: what codewords are multiplied by in each tensor, in a shape that broadcasts over it; None: 1.

    Returns:
        float32[K'], ascending, K' <= K, on the group's device.
    """
    masters = {site: group.master_weight(site).detach().float() for site in group.sites}
    if factors is not None:
        masters = {site: master / factors[site] for site, master in masters.items()}
        importance = importance and {site: importance[site] * factors[site].square() for site in group.sites}
    if group.has_zeros:
        codewords = max(1, codewords - 1)
    parts = [_unpruned(group, site, master) for site, master in masters.items()]
    weights = torch.cat(parts) if len(parts) > 1 else parts[0]  # a copy of the only layer would be for nothing
    if not len(weights):
        return weights.new_zeros(1)
    mass = None
    if importance is not None:
        mass = torch.cat([_unpruned(group, site, importance[site].float()) for site in group.sites]).cpu().numpy()
    return torch.from_numpy(optimal_codebook(weights.cpu().numpy(), codewords, mass, init)).to(weights.device)


def fit_codebook_of_each_row(
    group: GroupState, row: int, codewords: int, importance: Mapping[Site, Tensor] | None, init: Init = "optimal"
) -> Tensor:
    """Returns the best codebook for each row of a group's only tensor.

    Args:
        group: a group of one tensor; its pruned weights are left out.
        row: the number of consecutive weights in C order that are a row; the last may be shorter.
        codewords: K for each row; if weights are pruned, one codeword is reserved for zero.
        importance: the weight of each squared error, by tensor; None: all equal.
        init: as in ``optimal_codebook``.

    Returns:
        float32[rows, K'], ascending; a row that needs fewer codewords than others repeats its largest.
    """
    (site,) = group.sites
    master = group.master_weight(site).detach()
    # Moved from the device at once: a tensor may have thousands of rows.
    rows = master.float().cpu().reshape(-1).split(row)
    masses = [None] * len(rows) if importance is None else importance[site].float().cpu().reshape(-1).split(row)
    kept = (~group.pruned(site)).cpu().reshape(-1).split(row)
    if group.has_zeros:
        codewords = max(1, codewords - 1)
    codebooks = [
        optimal_codebook(weights[keep].numpy(), codewords, None if mass is None else mass[keep].numpy(), init)
        if keep.any()
        else np.zeros(1, np.float32)
        for weights, mass, keep in zip(rows, masses, kept, strict=True)
    ]
    longest = max(map(len, codebooks))
    padded = np.stack([np.pad(codebook, (0, longest - len(codebook)), mode="edge") for codebook in codebooks])
    return torch.from_numpy(padded).to(master.device)


def _unpruned(group: GroupState, site: Site, tensor: Tensor) -> Tensor:
    """Returns the entries of a tensor of the shape of a site whose weights are not pruned, [n]."""
    return tensor[~group.pruned(site)] if group.has_zeros else tensor.reshape(-1)


def _positive(importance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Adds a little to every importance, so that every cluster has a mean; if all are zero, returns ones."""
    mean = float(importance.mean())
    return importance / mean + 1e-3 if mean > 0 else np.ones_like(importance)


def _lloyd(values: NDArray[np.float64], sums: PrefixSums, centres: NDArray[np.float64]) -> NDArray[np.float64]:
    """Alternates between the nearest centre of each value and the mean of each cluster, until nothing changes."""
    borders = np.empty(0, dtype=np.int64)
    for _ in range(MAX_ITERATIONS):
        inner = np.searchsorted(values, (centres[1:] + centres[:-1]) / 2, side="right")
        moved = np.concatenate([[0], inner, [len(values)]])
        if np.array_equal(moved, borders):
            break
        borders = moved
        centres = sums.means(borders)
    return centres


def spread(weights: Tensor) -> float:
    """Returns the power of two nearest to the root mean square of the weights, by which they divide without rounding.

    The exponent is limited to -100 to 100; the result is 1 for no weights or only zeros.
    """
    rms = float(weights.double().square().mean().sqrt()) if len(weights) else 0.0
    return 2.0 ** max(-100, min(100, round(math.log2(rms)))) if rms > 0 else 1.0
