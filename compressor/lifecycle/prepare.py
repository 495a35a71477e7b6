"""Which tensors form a group, and which parameters an optimiser treats alike."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from compressor.formats.errors import UsageError
from compressor.policy.policy import Fate
from compressor.sharing.group import Group
from compressor.sharing.initialization import initialise_site
from compressor.sharing.sites import Site

__all__ = ["begun_rounds", "fitted_groups", "param_groups", "penalties"]


_log = logging.getLogger(__name__)


def fitted_groups(
    fates: Sequence[Fate],
    importance: Mapping[Site, Tensor] | None = None,
    preserve_sparsity: bool = False,
    from_scratch: bool = False,
    virtual: bool = False,
) -> list[Group]:
    """Make a group of each shared tensor, or of all under one scheme where it wants the whole network, and fit it.

    Args:
        preserve_sparsity: pin weights that are zero now to zero.
        from_scratch: the weights are random; those on ``meta`` are drawn now. Of trained ones, a scheme may have a word
            of caution.
        virtual: groups whose scheme generates its indices let go of their dense weights, each before the next is made.

    Raises UsageError for ``virtual`` where no scheme generates its indices, or weights are pruned.
    """
    schemes = [fate.scheme for fate in fates if fate.scheme]
    cautions = {scheme.id: scheme.caution for scheme in schemes if scheme.caution and not from_scratch}
    for name, caution in cautions.items():
        _log.warning("scheme %s: %s", name, caution)
    if virtual and not any(scheme.generator() for scheme in schemes):
        known = ", ".join(sorted({scheme.id for scheme in schemes}))
        raise UsageError(f"virtual=True: no scheme here generates its indices: {known}")
    together: dict[Any, list[Site]] = {}
    for number, fate in enumerate(fates):
        if fate.scheme:
            alone = None if fate.scheme.whole_network else number
            together.setdefault((alone, fate.scheme, fate.pruning), []).append(fate.site)
    groups = []
    for (_, scheme, pruning), sites in together.items():
        for site in sites:
            initialise_site(site)
        group = Group(scheme, sites, pruning, from_scratch, virtual and scheme.generator() is not None)
        _pin_zeros(group, preserve_sparsity)
        group.scheme.fit(group, importance)
        if group.virtual:
            group.let_go()
        groups.append(group)
    return groups


def _pin_zeros(group: Group, preserve_sparsity: bool) -> None:
    """Pin weights that are zero, where asked; a virtual weight can have none: their mask would be as large as it."""
    zeros = {site: site.tensor.detach() == 0 for site in group.sites} if preserve_sparsity else {}
    if any(bool(zero.any()) for zero in zeros.values()):
        for site, zero in zeros.items():
            group.prune(site, zero | group.pruned(site))
    if group.virtual and group.has_zeros:
        raise UsageError(f"virtual=True: {group.sites[0].name} is pruned, and a virtual weight is never whole")


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
        most = max(shares.get(id(group.latent(site)), 1.0) for site in group.sites)
        shares |= {id(codebook): most for codebook in group.parameters()}
    return shares


@torch.no_grad()
def begun_rounds(groups: Sequence[Group], progress: float) -> list[tuple[float, list[Tensor]]]:
    """Let the groups do what is due; give the rounds that begin: where each ends, and the parameters it is about."""
    begun: dict[float, list[Tensor]] = {}
    for group in groups:
        end = group.advance(progress)
        if end is not None:
            begun.setdefault(end, []).extend(group.trained())
    return list(begun.items())


def penalties(groups: Sequence[Group], task: Tensor) -> Tensor:
    """Give the sum of the schemes' own terms of the loss, 0 where they have none; ``task`` as for their ``penalty``."""
    terms = [term for group in groups if (term := group.scheme.penalty(group, task)) is not None]
    return torch.stack(terms).sum() if terms else torch.zeros(())
