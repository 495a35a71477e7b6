"""The weights of one layer under a scheme, for the tests of the schemes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compressor.sharing.curvature import Curvature
from compressor.sharing.group import Group
from compressor.sharing.scheme import Scheme
from compressor.sharing.sites import find_tensors

__all__ = ["bell", "fitted", "weight_of"]


def bell(count: int = 400) -> Tensor:
    """Returns weights distributed as those of networks."""
    torch.manual_seed(0)
    return torch.randn(count) * 0.05


def fitted(scheme: Scheme, weights: Tensor, importance: Tensor | None = None, pruned: Tensor | None = None) -> Group:
    """Returns the fitted group of one linear layer with these weights, [outputs, inputs] or [inputs]."""
    shape = weights.shape if weights.ndim == 2 else (1, weights.numel())
    layer = nn.Linear(shape[1], shape[0], bias=False).to(weights.dtype)
    with torch.no_grad():
        layer.weight.copy_(weights.view(shape))
    group = Group(scheme, find_tensors(layer))
    if pruned is not None:
        group.prune(group.sites[0], pruned.view(shape))
    scheme.fit(group, None if importance is None else {group.sites[0]: Curvature(importance.view(shape))})
    return group


def weight_of(group: Group) -> Tensor:
    """Returns the weights the network computes with, flat and differentiable."""
    return group.weight(group.sites[0], group.master_weight(group.sites[0])).reshape(-1)
