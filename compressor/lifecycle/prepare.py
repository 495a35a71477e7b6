"""Preparation: from the plan of a policy to fitted groups, and what all groups do as training progresses."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compressor.formats.errors import UsageError
from compressor.policy.policy import TensorPlan
from compressor.sharing.group import Group
from compressor.sharing.initialization import initialise_site
from compressor.sharing.sites import Site, padding_rows

__all__ = ["fit_groups", "penalties", "start_rounds"]


_log = logging.getLogger(__name__)


def fit_groups(
    plans: Sequence[TensorPlan],
    importance: Mapping[Site, Tensor] | None = None,
    preserve_sparsity: bool = False,
    from_scratch: bool = False,
    virtual: bool = False,
) -> list[Group]:
    """Creates and fits a group for each shared tensor, or for all tensors of a scheme that spans the network.

    Tensors with ``requires_grad_(False)`` have groups of their own, which are frozen: their values are final.

    Args:
        plans: what the policy plans for each tensor.
        importance: the weight of each squared error, by site; None: all equal.
        preserve_sparsity: whether weights that are zero now stay zero.
        from_scratch: whether the weights are random; those on ``meta`` are initialised here. For trained weights, a
            scheme may log a caution.
        virtual: whether groups whose scheme generates its indices free their dense weights, each before the next is
            created.

    Returns:
        The groups.

    Raises:
        UsageError: ``virtual`` is set but no scheme generates its indices, or weights are pruned.
    """
    schemes = [plan.scheme for plan in plans if plan.scheme]
    cautions = {scheme.id: scheme.caution for scheme in schemes if scheme.caution and not from_scratch}
    for name, caution in cautions.items():
        _log.warning("scheme %s: %s", name, caution)
    if virtual and not any(scheme.generator() for scheme in schemes):
        used = ", ".join(sorted({scheme.id for scheme in schemes}))
        raise UsageError(f"virtual=True: no scheme here generates its indices: {used}")
    grouped: dict[Any, list[Site]] = {}
    for number, plan in enumerate(plans):
        if plan.scheme:
            own_group = None if plan.scheme.whole_network else number
            frozen = not plan.site.tensor.requires_grad
            grouped.setdefault((own_group, plan.scheme, plan.pruning, frozen), []).append(plan.site)
    groups = []
    for (_, scheme, pruning, frozen), sites in grouped.items():
        for site in sites:
            initialise_site(site)
        group = Group(scheme, sites, pruning, from_scratch, virtual and scheme.generator() is not None)
        _pin_zeros(group, preserve_sparsity)
        group.scheme.fit(group, importance)
        if frozen:
            group.freeze()
        if group.virtual:
            group.free_dense()
        groups.append(group)
    return groups


def _pin_zeros(group: Group, preserve_sparsity: bool) -> None:
    """Prunes the weights that are zero, if asked, and in any case the zeros that stand for padding in embeddings.

    Raises:
        UsageError: a virtual group is pruned, whose mask would be as large as its dense weights.
    """
    zeros = {site: site.tensor.detach() == 0 for site in group.sites if preserve_sparsity or padding_rows(site)}
    if not preserve_sparsity:
        for site, zero in zeros.items():
            padding = torch.zeros(len(zero), 1, dtype=torch.bool, device=zero.device)
            padding[list(padding_rows(site))] = True
            zero &= padding
    if any(bool(zero.any()) for zero in zeros.values()):
        for site, zero in zeros.items():
            group.prune(site, zero | group.pruned(site))
    if group.virtual and group.has_zeros:
        raise UsageError(f"virtual=True: {group.sites[0].name} is pruned, and a virtual weight is never whole")


@torch.no_grad()
def start_rounds(groups: Sequence[Group], progress: float) -> list[tuple[float, list[Tensor]]]:
    """Advances all groups and returns the rounds that begin.

    Args:
        groups: the groups of the model.
        progress: of the training, 0 to 1.

    Returns:
        For each round the progress at which it ends, and the parameters that it trains.
    """
    started: dict[float, list[Tensor]] = {}
    for group in groups:
        end = group.on_step(progress)
        if end is not None:
            started.setdefault(end, []).extend(group.trained())
    return list(started.items())


def penalties(groups: Sequence[Group], task: Tensor) -> Tensor:
    """Returns the sum of the schemes' penalties on the loss, 0 if there are none.

    Args:
        groups: the groups of the model.
        task: the loss of the task, as for ``Scheme.penalty``.
    """
    terms = [term for group in groups if not group.frozen and (term := group.scheme.penalty(group, task)) is not None]
    return torch.stack(terms).sum() if terms else torch.zeros(())
