"""Which parameters an optimiser treats alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from compressor.sharing.group import Group

__all__ = ["param_groups"]


def param_groups(
    model: nn.Module, groups: Sequence[Group], lr: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Sort a model's parameters for an optimiser: what a scheme trains by scheme, whose rounds may restart the rate.

    Weight decay is for the rest, but for norms and biases.
    """
    owned = {id(tensor): group.scheme for group in groups for tensor in group.trained()}
    shares = {} if layer_decay == 1 else _shares_of_rate(model, groups, layer_decay)
    alike: dict[tuple[Any, float, float], list[Tensor]] = {}
    for parameter in model.parameters():
        decay = 0.0 if parameter.ndim < 2 or id(parameter) in owned else weight_decay
        alike.setdefault((owned.get(id(parameter)), decay, shares.get(id(parameter), 1.0)), []).append(parameter)
    return [{"params": params, "lr": lr * share, "weight_decay": decay} for (_, decay, share), params in alike.items()]


def _shares_of_rate(model: nn.Module, groups: Sequence[Group], layer_decay: float) -> dict[int, float]:
    """Give what each parameter has of the learning rate, by id: a codebook as much as the last of its layers."""
    shares = {
        id(parameter): alike["lr_scale"]
        for alike in param_groups_layer_decay(model, layer_decay=layer_decay)
        for parameter in alike["params"]
    }
    for group in groups:
        most = max(shares.get(id(group.master_weight(site)), 1.0) for site in group.sites)
        shares |= {id(codebook): most for codebook in group.parameters()}
    return shares
