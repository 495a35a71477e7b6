"""Reseeding: codewords that no weight uses are put back to use."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from compressor.clustering.granularity import Granularity
from compressor.ops.parallel import cache_chunks
from compressor.sharing.group_state import GroupState

__all__ = ["reseed"]

_log = logging.getLogger(__name__)


def reseed(group: GroupState, granularity: Granularity) -> None:
    """Splits a cluster for each codeword that no weight uses: the one with most squared error in the same codebook.

    An unused codeword has no gradient, so training alone would never use it again. The halves of a normal or uniform
    cluster have their means about 0.8 standard deviations from the middle, and an eighth of the squared error each. A
    cluster of vectors is split across the entry with most squared error.

    Args:
        group: whose learnt codewords are moved in place.
        granularity: of its codebooks.
    """
    values, length = group.values.detach(), granularity.length(group)
    codewords = len(values) // (granularity.codebook_count(group) * length)
    entries = _order(values, granularity.rows(group))
    found = _clusters(group, granularity, values[entries] * group.unit)
    count, mean, error = (one.view(-1, length) for one in found)
    entries, reseeded = entries.view(-1, length), 0
    for unused in torch.nonzero(count[:, 0] == 0).flatten().tolist():
        start = unused // codewords * codewords
        widest = start + int(error[start : start + codewords].sum(dim=1).argmax())
        entry = int(error[widest].argmax())
        if float(error[widest, entry]) <= 0:
            continue
        offset = 0.8 * (error[widest, entry] / count[widest, entry]).sqrt()
        mean[unused] = mean[widest]
        mean[unused, entry] -= offset
        mean[widest, entry] += offset
        for half in (unused, widest):
            values[entries[half]] = (mean[half] / group.unit).to(values.dtype)
        count[widest] /= 2
        error[widest] /= 2
        error[widest, entry] /= 4
        count[unused], error[unused] = count[widest], error[widest]
        reseeded += 1
    if reseeded:
        names = group.sites[0].name if len(group.sites) == 1 else f"{len(group.sites)} tensors"
        _log.info("%s: %s of %s codewords were unused and are put back to use", names, reseeded, len(entries))


def _order(values: Tensor, rows: int) -> Tensor:
    """Returns the places of the values by which each row ascends; with no rows, as they are."""
    places = torch.arange(len(values), device=values.device)
    if not rows:
        return places
    order = values.view(rows, -1).argsort()
    return places.view(rows, -1).gather(1, order).view(-1)


def _clusters(group: GroupState, granularity: Granularity, codebooks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns count, mean and squared error of the weights nearest to each entry of the codebooks, float64[n] each.

    Args:
        group: of the weights.
        granularity: of the codebooks.
        codebooks: float32[n], one after the other, each ascending where codewords are single weights.
    """
    flat = codebooks.double()
    count, first, second = torch.zeros(3, len(flat), dtype=torch.float64, device=flat.device)
    for site in group.sites:
        master, factor = group.master_weight(site).detach(), granularity.factor(group, site)
        weights = (master if factor is None else master / factor).float()
        positions, kept = granularity.positions(group, site, weights, codebooks), ~group.pruned(site).reshape(-1)
        positions, weights = positions.reshape(-1), weights.reshape(-1)
        # In chunks, because a layer in double precision would be a large part of a step's memory.
        for chunk in cache_chunks(weights):
            nearest_here = positions[chunk][kept[chunk]]
            offset = weights[chunk][kept[chunk]].double() - flat[nearest_here]
            count += torch.bincount(nearest_here, minlength=len(flat))
            first += torch.bincount(nearest_here, offset, len(flat))
            second += torch.bincount(nearest_here, offset.square(), len(flat))
    shift = first / count.clamp(min=1)
    return count, flat + shift, (second - first * shift).clamp(min=0)
