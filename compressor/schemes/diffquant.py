"""Differentiable quantisation: the weights stand still, and the points they are rounded to are learnt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from compressor.group import Group
from compressor.lookup import lookup, nearest
from compressor.scheme import Scheme, Shared, register, share_scalars
from compressor.sites import Site

LEAST = 1e-30  # importance: where all have none, all count alike


@register
@dataclass(frozen=True)
class DiffQuant(Scheme):
    """Round each frozen weight to the nearest of a few points, and learn where the points are.

    With ``p`` the points, ascending, and ``a_i`` the nearest of them to the weight ``w_i`` as it was before training,
    the network computes with ``p[a]``; ``dL/dp_k`` is the sum of ``dL/dw_i`` over ``a_i = k``. The assignment is found
    anew in every step, so a point that moves takes weights over from its neighbours; the weights themselves have no
    gradient. The points start at quantiles, the least and the largest weight among them.

    Args:
        codewords: K, the number of points of a tensor.

    Reference: Polino, Pascanu, Alistarh, "Model Compression via Distillation and Quantization", ICLR 2018, section 4.
    """

    # Where we differ from the paper and its code:
    # - No tensor is scaled to 0..1 first: with one scale per tensor that only changes the unit of the points, and the
    #   group keeps its codebook in units of the weights' spread already.
    # - The paper's code moves points between tensors at the start, by the norms of the tensors' gradients. That is a
    #   choice of bits for each tensor, which the rules of a policy make, and no matter of one codebook.
    # - A quantile is one of the weights, not between two; a tensor of no more than K values keeps them exactly.

    id: ClassVar[str] = "diffquant"
    paper: ClassVar[str] = 'Polino, Pascanu, Alistarh, "Model Compression via Distillation and Quantization", ICLR 2018'

    codewords: Annotated[int, Field(ge=1, le=65536, strict=True)] = 16

    def stored_values(self, weights: int) -> int:
        """One per point."""
        del weights
        return self.codewords

    def fit(self, group: Group, importance: Mapping[Site, Tensor] | None) -> None:
        """Start the points at the quantiles of the weights."""
        weights = torch.cat([group.survivors(site).float() for site in group.sites])
        counts = None
        if importance is not None:
            counts = torch.cat(
                [importance[site][~group.pruned(site)].double().clamp(min=LEAST) for site in group.sites]
            )
        points = self.codewords - 1 if group.has_zeros else self.codewords  # where weights are pruned, zero is one more
        group.set_codebook(quantiles(weights, max(1, points), counts), learnt=True)

    def weight(self, group: Group, site: Site, latent: Tensor) -> Tensor:
        """Give the point that is nearest to each weight now; the gradient is the points' alone."""
        points = _points(group)
        return lookup(points, nearest(latent.detach().float(), points.detach()))

    def share(self, group: Group) -> Shared:
        """Give the points and each weight's nearest."""
        points = _points(group).detach()
        found = {site: nearest(group.latent(site).detach().float(), points) for site in group.sites}
        return share_scalars(group, points, found)


def quantiles(weights: Tensor, count: int, importance: Tensor | None = None) -> Tensor:
    """Pick weights that part all of them into equal shares, both ends included; all values where they are so few.

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
    first = 0.0 if count > 1 else 0.5  # one point is the median
    shares = torch.linspace(first, 1, count, dtype=torch.float64, device=values.device)
    picked = torch.searchsorted(passed, shares * passed[-1]).clamp_(max=len(values) - 1)
    different: Tensor = values[picked].unique_consecutive()
    return different


def _points(group: Group) -> Tensor:
    # The paper sorts the points after each step. Sorted when used they are the same, and what the optimiser remembers
    # of a point stays with it when it overtakes another.
    return group.codebook().sort().values
