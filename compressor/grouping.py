"""Which tensors form a group, and which parameters an optimiser treats alike."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compressor.formats.errors import UsageError
from compressor.group import Group
from compressor.policy import Fate
from compressor.sites import Site

__all__ = ["begun_rounds", "make_groups", "make_virtual", "param_groups"]


_log = logging.getLogger(__name__)


def make_groups(fates: Sequence[Fate], preserve_sparsity: bool = False, from_scratch: bool = False) -> list[Group]:
    """Make a group of each shared tensor, or of all under one scheme where it wants the whole network.

    Args:
        preserve_sparsity: pin weights that are zero now to zero.
        from_scratch: the weights are random; of trained ones, a scheme may have a word of caution.
    """
    cautions = {fate.scheme.id: fate.scheme.caution for fate in fates if fate.scheme and fate.scheme.caution}
    for scheme, caution in cautions.items() if not from_scratch else ():
        _log.warning("scheme %s: %s", scheme, caution)
    together: dict[Any, list[Site]] = {}
    for number, fate in enumerate(fates):
        if fate.scheme:
            alone = None if fate.scheme.whole_network else number
            together.setdefault((alone, fate.scheme, fate.pruning), []).append(fate.site)
    groups = [Group(scheme, sites, pruning, from_scratch) for (_, scheme, pruning), sites in together.items()]
    for group in groups:
        zeros = {site: site.tensor.detach() == 0 for site in group.sites} if preserve_sparsity else {}
        if any(bool(zero.any()) for zero in zeros.values()):
            for site, zero in zeros.items():
                group.prune(site, zero | group.pruned(site))
    return groups


def make_virtual(groups: Sequence[Group]) -> set[str]:
    """Let groups whose indices are generated do without dense weights; give the names of their tensors.

    Raises UsageError where there are none such, or weights are pruned, which takes a mask as large as they are.
    """
    able = [group for group in groups if group.scheme.generator() is not None]
    if not able:
        known = ", ".join(sorted({group.scheme.id for group in groups}))
        raise UsageError(f"virtual=True: no scheme here generates its indices: {known}")
    for group in able:
        if group.has_zeros:
            raise UsageError(f"virtual=True: {group.sites[0].name} is pruned, and a virtual weight is never whole")
        group.become_virtual()
    return {site.name for group in able for site in group.sites}


def param_groups(model: nn.Module, groups: Sequence[Group], lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Sort a model's parameters for an optimiser: what a scheme trains by scheme, whose rounds may restart the rate.

    Weight decay is for the rest, but for norms and biases.
    """
    owned = {id(tensor): group.scheme for group in groups for tensor in group.trained()}
    alike: dict[tuple[Any, float], list[Tensor]] = {}
    for parameter in model.parameters():
        decay = 0.0 if parameter.ndim < 2 or id(parameter) in owned else weight_decay
        alike.setdefault((owned.get(id(parameter)), decay), []).append(parameter)
    return [{"params": params, "lr": lr, "weight_decay": decay} for (_, decay), params in alike.items()]


@torch.no_grad()
def begun_rounds(groups: Sequence[Group], progress: float) -> list[tuple[float, list[Tensor]]]:
    """Let the groups do what is due; give the rounds that begin: where each ends, and the parameters it is about."""
    begun: dict[float, list[Tensor]] = {}
    for group in groups:
        end = group.advance(progress)
        if end is not None:
            begun.setdefault(end, []).extend(group.trained())
    return list(begun.items())
