"""Differentiable quantisation: the weights stay frozen, and the points they are rounded to are learnt."""

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
from compressor.sharing.curvature import Curvature, diagonals
from compressor.sharing.export import SharedTensors, export_scalars
from compressor.sharing.group_state import GroupState
from compressor.sharing.registry import register
from compressor.sharing.scheme import Scheme
from compressor.sharing.sites import Site

# Buffers of the group, one entry a site; the names are in checkpoints.
POINT_COUNTS = "lengths"  # int64[sites]: how many of the group's codewords are the points of each site
SCALES = "scales"  # float32[sites]: what the points of each site are multiplied by

MIN_IMPORTANCE = 1e-30  # where no weight has any importance, all count alike


@register
@dataclass(frozen=True)
class DiffQuant(Scheme):
    """Rounds each frozen weight to the nearest of K points, and learns where the points are.

    With ``w`` the N weights of a tensor before training, ``p`` its K points in ascending order, ``a`` the N indices and
    L the loss::

        a_i = argmin_k |w_i - p_k|                      in every step
        weight_i = p[a_i]
        dL/dp_k = sum of dL/dweight_i over a_i = k      section 4

    The assignment is computed anew in every step, so a point that moves takes weights over from its neighbours. The
    weights themselves have no gradient. The points start in the middles of K equal shares of the weights.

    Args:
        codewords: K, the number of points of a tensor, 1 to 65,536; default 16.
        redistribute: whether K is the mean over the tensors of a rule instead: each has half as many points, and of the
            other half a share in proportion to the norm of its gradient on the calibration batches. Without calibration
            batches all tensors have K. Default False.

    Example:
        >>> from compressor import Compressor, Policy, Rule
        >>> layer = torch.nn.Linear(4, 1, bias=False)
        >>> layer.weight.data = torch.tensor([[0.0, 0.1, 0.9, 1.0]])
        >>> job = Compressor(layer, Policy([Rule("*", scheme="diffquant", codewords=2)]), teacher=None).prepare()
        >>> [round(weight, 2) for weight in job.model.weight[0].tolist()]  # points: the middle of each half
        [0.0, 0.0, 0.9, 0.9]

    Reference: Polino, Pascanu, Alistarh, "Model Compression via Distillation and Quantization", ICLR 2018, section 4.
    """

    # Divergences from the paper and its code:
    # - No tensor is scaled to 0..1 first. With one scale per tensor that only changes the unit of the points, and the
    #   group keeps its codebook in units of the weights' spread already.
    # - The paper's code has the smallest and the largest weight among the quantiles. Few weights are nearest to those,
    #   so that two bits are little more than one: docs/schemes.md has the figures.
    # - A quantile is one of the weights, never a value between two; a tensor of at most K values keeps them exactly.

    id: ClassVar[str] = "diffquant"
    paper: ClassVar[str] = 'Polino, Pascanu, Alistarh, "Model Compression via Distillation and Quantization", ICLR 2018'

    codewords: Annotated[int, Field(ge=1, le=65536, strict=True)] = 16
    redistribute: bool = False

    @property
    def whole_network(self) -> bool:
        """Whether points are redistributed; the points of all tensors then lie one after the other in one codebook."""
        return self.redistribute

    @property
    def wants_curvature(self) -> bool:
        """Whether points are redistributed, for which the norms of the gradients are needed."""
        return self.redistribute

    def stored_values(self, weights: int) -> int:
        """Returns K, one value a point."""
        del weights
        return self.codewords

    def fit(self, group: GroupState, curvature: Mapping[Site, Curvature] | None) -> None:
        """Sets the points to quantiles of the weights, each weight counting by its importance."""
        books = []
        importance = diagonals(curvature)
        for site, count in zip(group.sites, self._point_counts(group, importance), strict=True):
            kept = None if importance is None else importance[site][~group.pruned(site)]
            mass = None if kept is None else kept.double().clamp(min=MIN_IMPORTANCE)
            points = count - 1 if group.has_zeros else count  # where weights are pruned, zero is one more
            books.append(quantiles(group.survivors(site).float(), max(1, points), mass))
        if self.redistribute:
            group.unit.fill_(1.0)  # no one unit suits all tensors: each has a scale instead
        scales = [spread(group.survivors(site)) if self.redistribute else 1.0 for site in group.sites]
        group.register_buffer(SCALES, torch.tensor(scales, device=group.unit.device))
        group.set_codebook(torch.cat([book / scale for book, scale in zip(books, scales, strict=True)]), learnt=True)
        group.register_buffer(POINT_COUNTS, torch.tensor([len(book) for book in books]))

    def _point_counts(self, group: GroupState, importance: Mapping[Site, Tensor] | None) -> list[int]:
        """Returns the number of points of each site."""
        if not self.redistribute or importance is None:
            return [self.codewords] * len(group.sites)
        norms = [float(importance[site].double().sum().sqrt()) for site in group.sites]
        return redistributed(self.codewords, norms)

    def weight(self, group: GroupState, site: Site, master: Tensor) -> Tensor:
        """Returns the point that is nearest to each weight now; the gradient is the points' alone."""
        points = _points(group, site)
        return lookup(points, nearest(master.detach().float(), points.detach()))

    def export(self, group: GroupState) -> SharedTensors:
        """Returns the points of each site and the index of each weight's nearest point."""
        exported = []
        for site in group.sites:
            points = _points(group, site).detach()
            indices = nearest(group.master_weight(site).detach().float(), points)
            exported.append(export_scalars(group, points, {site: indices}))
        books = tuple(book for one in exported for book in one.books)
        tensors = {name: replace(t, book=n) for n, one in enumerate(exported) for name, t in one.tensors.items()}
        return SharedTensors(books, tensors)


def redistributed(codewords: int, norms: Sequence[float]) -> list[int]:
    """Returns the number of points of each tensor: half of them alike, the rest in proportion to the tensors' norms.

    Args:
        codewords: the mean of the result.
        norms: the norm of each tensor's gradient, >= 0; where all are 0, all tensors get the same.

    Example:
        >>> redistributed(4, [1.0, 0.0, 3.0])
        [4, 2, 6]
    """
    least = (codewords + 1) // 2
    free, total = (codewords - least) * len(norms), sum(norms)
    reached = [free * sum(norms[: n + 1]) / total if total else free * (n + 1) / len(norms) for n in range(len(norms))]
    ends = [0, *(math.floor(end + 0.5) for end in reached)]  # rounding sums instead of shares keeps the total exact
    return [least + last - first for first, last in pairwise(ends)]


def quantiles(weights: Tensor, count: int, importance: Tensor | None = None) -> Tensor:
    """Returns the weights in the middles of ``count`` equal shares of all; all values where there are no more.

    Args:
        weights: float32[n], any order.
        count: the number of shares, at least 1; where several shares have the same middle the result is shorter.
        importance: float64[n] > 0, how often each weight counts; None: once.

    Returns:
        float32[K], ascending, without repetition, 1 <= K <= count; 0.0 alone where there are no weights.

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
    counts = torch.ones_like(values, dtype=torch.float64) if importance is None else importance[order]
    cumulative = counts.cumsum(0)
    middles = (torch.arange(count, dtype=torch.float64, device=values.device) + 0.5) / count
    positions = torch.searchsorted(cumulative, middles * cumulative[-1]).clamp_(max=len(values) - 1)
    picked: Tensor = values[positions].unique_consecutive()
    return picked


def _points(group: GroupState, site: Site) -> Tensor:
    """Returns the points of a site in ascending order, float32[K], differentiable."""
    # Divergence: the paper sorts the points after each step. Sorting them here gives the same points, and keeps the
    # optimiser's state of a point with it when it overtakes another.
    number, counts = group.sites.index(site), group.get_buffer(POINT_COUNTS).tolist()
    points = group.codebook().split(counts)[number].sort().values
    scaled: Tensor = points * group.get_buffer(SCALES)[number]
    return scaled
