"""Differentiable quantisation: the weights stand still, and the points they are rounded to are learnt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from compressor.clustering.kmeans1d import spread
from compressor.ops.gather_scatter import lookup
from compressor.ops.nearest import nearest
from compressor.sharing.export import SharedTensors, export_scalars
from compressor.sharing.group_state import GroupState
from compressor.sharing.registry import register
from compressor.sharing.scheme import Scheme
from compressor.sharing.sites import Site

LEAST = 1e-30  # importance: where all have none, all count alike


@register
@dataclass(frozen=True)
class DiffQuant(Scheme):
    """Round each frozen weight to the nearest of a few points, and learn where the points are.

    With ``p`` the points, ascending, and ``a_i`` the nearest of them to the weight ``w_i`` as it was before training,
    the network computes with ``p[a]``; ``dL/dp_k`` is the sum of ``dL/dw_i`` over ``a_i = k``. The assignment is found
    anew in every step, so a point that moves takes weights over from its neighbours; the weights themselves have no
    gradient. The points start in the middles of K equal shares of the weights.

    Args:
        codewords: K, the number of points of a tensor.
        redistribute: K is the mean over the tensors: each has half as many, and of the other half a share by the norm
            of its gradient on the calibration batches; without these all tensors have K.

    Reference: Polino, Pascanu, Alistarh, "Model Compression via Distillation and Quantization", ICLR 2018, section 4.
    """

    # Where we differ from the paper and its code:
    # - No tensor is scaled to 0..1 first: with one scale per tensor that only changes the unit of the points, and the
    #   group keeps its codebook in units of the weights' spread already.
    # - The paper's code has the least and the largest weight among the quantiles. They have hardly a weight to
    #   themselves, and with them two bits are little more than one: docs/schemes.md has the figures.
    # - A quantile is one of the weights, not between two; a tensor of no more than K values keeps them exactly.

    id: ClassVar[str] = "diffquant"
    paper: ClassVar[str] = 'Polino, Pascanu, Alistarh, "Model Compression via Distillation and Quantization", ICLR 2018'

    codewords: Annotated[int, Field(ge=1, le=65536, strict=True)] = 16
    redistribute: bool = False

    @property
    def whole_network(self) -> bool:
        """Whether points move from one tensor to another; the codebooks then lie one after the other."""
        return self.redistribute

    @property
    def wants_gradients(self) -> bool:
        """Whether it asks for calibration batches."""
        return self.redistribute

    def stored_values(self, weights: int) -> int:
        """One per point."""
        del weights
        return self.codewords

    def fit(self, group: GroupState, importance: Mapping[Site, Tensor] | None) -> None:
        """Start the points at the quantiles of the weights."""
        books = []
        for site, count in zip(group.sites, self._counts(group, importance), strict=True):
            counted = None if importance is None else importance[site][~group.pruned(site)].double().clamp(min=LEAST)
            points = count - 1 if group.has_zeros else count  # where weights are pruned, zero is one more
            books.append(quantiles(group.survivors(site).float(), max(1, points), counted))
        if self.redistribute:
            group.unit.fill_(1.0)  # each tensor has its own instead, for one would suit none of them
        scales = [spread(group.survivors(site)) if self.redistribute else 1.0 for site in group.sites]
        group.register_buffer("scales", torch.tensor(scales, device=group.unit.device))
        group.set_codebook(torch.cat([book / scale for book, scale in zip(books, scales, strict=True)]), learnt=True)
        group.register_buffer("lengths", torch.tensor([len(book) for book in books]))

    def _counts(self, group: GroupState, importance: Mapping[Site, Tensor] | None) -> list[int]:
        """Give the number of points of each site."""
        if not self.redistribute or importance is None:
            return [self.codewords] * len(group.sites)
        norms = [float(importance[site].double().sum().sqrt()) for site in group.sites]
        return redistributed(self.codewords, norms)

    def weight(self, group: GroupState, site: Site, master: Tensor) -> Tensor:
        """Give the point that is nearest to each weight now; the gradient is the points' alone."""
        points = _points(group, site)
        return lookup(points, nearest(master.detach().float(), points.detach()))

    def export(self, group: GroupState) -> SharedTensors:
        """Give the points and each weight's nearest."""
        shared = []
        for site in group.sites:
            points = _points(group, site).detach()
            found = nearest(group.master_weight(site).detach().float(), points)
            shared.append(export_scalars(group, points, {site: found}))
        books = tuple(book for one in shared for book in one.books)
        tensors = {name: replace(t, book=n) for n, one in enumerate(shared) for name, t in one.tensors.items()}
        return SharedTensors(books, tensors)


def redistributed(codewords: int, norms: Sequence[float]) -> list[int]:
    """Share ``codewords`` for each tensor out anew: half of them evenly, the rest by the tensors' norms.

    >>> redistributed(4, [1.0, 0.0, 3.0])
    [4, 2, 6]
    """
    least = (codewords + 1) // 2
    free, total = (codewords - least) * len(norms), sum(norms)
    reached = [free * sum(norms[: n + 1]) / total if total else free * (n + 1) / len(norms) for n in range(len(norms))]
    ends = [0, *(math.floor(end + 0.5) for end in reached)]  # so that no rounding adds a point or loses one
    return [least + last - first for first, last in pairwise(ends)]


def quantiles(weights: Tensor, count: int, importance: Tensor | None = None) -> Tensor:
    """Pick weights from the middles of equal shares of them; all values where they are so few.

    Args:
        weights: float32[n].
        count: how many to pick; where several are the same weight there are fewer.
        importance: float64[n] > 0, how often each weight counts; None: once.

    Returns:
        float32[K], ascending, 1 <= K <= count; 0.0 where there are no weights.

    Example:
        >>> quantiles(torch.tensor([3.0, 1.0, 2.0, 9.0, 4.0]), 3).tolist()
        [1.0, 3.0, 9.0]
    """
    if not len(weights):
        return weights.new_zeros(1)
    values, order = weights.sort()
    distinct: Tensor = values.unique_consecutive()
    if len(distinct) <= count:
        return distinct
    passed = (torch.ones_like(values, dtype=torch.float64) if importance is None else importance[order]).cumsum(0)
    middles = (torch.arange(count, dtype=torch.float64, device=values.device) + 0.5) / count
    picked = torch.searchsorted(passed, middles * passed[-1]).clamp_(max=len(values) - 1)
    different: Tensor = values[picked].unique_consecutive()
    return different


def _points(group: GroupState, site: Site) -> Tensor:
    # The paper sorts the points after each step. Sorted when used they are the same, and what the optimiser remembers
    # of a point stays with it when it overtakes another.
    number, lengths = group.sites.index(site), group.get_buffer("lengths").tolist()
    points = group.codebook().split(lengths)[number].sort().values
    scaled: Tensor = points * group.get_buffer("scales")[number]
    return scaled
