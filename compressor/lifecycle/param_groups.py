"""Parameter groups for optimisers, by scheme, weight decay and learning rate."""

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
    """Divides a model's parameters into groups for an optimiser.

    Parameters that a scheme trains are grouped by scheme, because the rounds of a scheme restart their learning rate,
    and have no weight decay; neither have norms and biases.

    Args:
        model: its parameters are divided.
        groups: its groups of shared tensors.
        lr: the learning rate.
        weight_decay: of the other parameters.
        layer_decay: factor between the learning rates of neighbouring layers; 1: all equal.

    Returns:
        Dicts of ``params``, ``lr`` and ``weight_decay``, as ``torch.optim`` takes them.
    """
    schemes = {id(tensor): group.scheme for group in groups for tensor in group.trained()}
    scales = {} if layer_decay == 1 else _lr_scales(model, groups, layer_decay)
    divided: dict[tuple[Any, float, float], list[Tensor]] = {}
    for parameter in model.parameters():
        decay = 0.0 if parameter.ndim < 2 or id(parameter) in schemes else weight_decay
        key = schemes.get(id(parameter)), decay, scales.get(id(parameter), 1.0)
        divided.setdefault(key, []).append(parameter)
    return [
        {"params": params, "lr": lr * scale, "weight_decay": decay} for (_, decay, scale), params in divided.items()
    ]


def _lr_scales(model: nn.Module, groups: Sequence[Group], layer_decay: float) -> dict[int, float]:
    """Returns the factor of the learning rate of each parameter, by id; a codebook has that of its last layer."""
    scales = {
        id(parameter): layer["lr_scale"]
        for layer in param_groups_layer_decay(model, layer_decay=layer_decay)
        for parameter in layer["params"]
    }
    for group in groups:
        largest = max(scales.get(id(group.master_weight(site)), 1.0) for site in group.sites)
        scales |= {id(codebook): largest for codebook in group.parameters()}
    return scales
