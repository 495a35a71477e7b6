"""Parameter groups for optimisers, by scheme, weight decay and learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.optim import Optimizer

from compressor.formats.errors import UsageError
from compressor.sharing.code_length import CodeLength, is_priced
from compressor.sharing.group import Group
from compressor.sharing.sites import Site

__all__ = ["check_embeddings", "check_optimizer", "freeze_untrained", "param_groups"]

GRID_RATE = 3.0  # times the learning rate of norms and biases: weights of a grid have to cross from step to step
_MAX_LISTED = 3  # tensors that a message lists


def param_groups(
    model: nn.Module, groups: Sequence[Group], lr: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Divides a model's parameters into groups for an optimiser.

    Parameters that a scheme trains are grouped by scheme, because the rounds of a scheme restart their learning rate,
    and have no weight decay; neither have norms and biases. Tensors on grids learn at ``GRID_RATE`` times the rate, and
    in proportion to their steps.

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
    scales, grids = {} if layer_decay == 1 else _lr_scales(model, groups, layer_decay), _grid_rates(groups)
    divided: dict[tuple[Any, float, float], list[Tensor]] = {}
    for parameter in model.parameters():
        decay = 0.0 if parameter.ndim < 2 or id(parameter) in schemes else weight_decay
        scale = scales.get(id(parameter), 1.0) * grids.get(id(parameter), 1.0)
        divided.setdefault((schemes.get(id(parameter)), decay, scale), []).append(parameter)
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


def _grid_rates(groups: Sequence[Group]) -> dict[int, float]:
    """Returns the learning rate of each tensor on a grid, by id, relative to that of norms and biases.

    Steps follow from curvature: an error of one costs the same in all tensors, so all should need as long to make one.
    """
    steps = {
        id(group.master_weight(site)): CodeLength(group).grid[1]
        for group in groups
        if is_priced(group)
        for site in group.sites
    }
    mean = math.exp(fmean(map(math.log, steps.values()))) if steps else 1.0
    return {key: GRID_RATE * step / mean for key, step in steps.items()}


def freeze_untrained(groups: Sequence[Group]) -> None:
    """Freezes groups whose weights take no gradient: they may have been frozen after their fit."""
    for group in groups:
        if not group.virtual and not any(group.master_weight(site).requires_grad for site in group.sites):
            group.freeze()


def check_embeddings(sites: Sequence[Site]) -> None:
    """Checks that no embedding that shares values has an option of torch's that cannot be trained with them.

    Raises:
        UsageError: one has sparse gradients, or changes its weights in the forward pass.
    """
    for site in sites:
        for module, _ in site.owners:
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) and (module.sparse or module.max_norm is not None):
                layer = site.name.rpartition(".")[0]
                held = f"model.get_submodule({layer!r})" if layer else "model"
                option, off = ("sparse", False) if module.sparse else ("max_norm", None)
                raise UsageError(
                    f"{site.name}: an embedding with {option} cannot be trained while it shares values: "
                    f"{held}.{option} = {off}, or Rule.ignore({layer or '*'!r})"
                )


def check_optimizer(optimizer: Optimizer, groups: Sequence[Group]) -> None:
    """Checks that an optimiser holds all that is trained of some groups: one that does not would leave it unchanged.

    Frozen tensors, those without ``requires_grad``, need not be held.

    Raises:
        UsageError: a codebook or master weight is missing; the message lists the first.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for group in groups for name, tensor in _trained(group) if id(tensor) not in held]
    if missing:
        more = f" and {len(missing) - _MAX_LISTED} more" if len(missing) > _MAX_LISTED else ""
        raise UsageError(
            f"the optimiser does not hold {', '.join(missing[:_MAX_LISTED])}{more}, which would never train: build it "
            "after prepare(), from job.param_groups(lr) or job.model.parameters()"
        )


def _trained(group: Group) -> list[tuple[str, Tensor]]:
    """Returns what training changes of a group, with the name a user knows it by."""
    first = group.sites[0].name
    codebooks = [(f"the codebook of {first}", codebook) for codebook in group.parameters()]
    masters = [(f"the master weight of {site.name}", group.master_weight(site)) for site in group.sites]
    return [(name, tensor) for name, tensor in codebooks + masters if tensor.requires_grad]
