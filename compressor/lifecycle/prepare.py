"""From the plan of a policy to fitted groups, and what they do as training progresses."""

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
from compressor.sharing.sites import Site

__all__ = ["fit_groups", "penalties", "start_rounds"]


_log = logging.getLogger(__name__)


def fit_groups(
    plans: Sequence[TensorPlan],
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
    schemes = [plan.scheme for plan in plans if plan.scheme]
    cautions = {scheme.id: scheme.caution for scheme in schemes if scheme.caution and not from_scratch}
    for name, caution in cautions.items():
        _log.warning("scheme %s: %s", name, caution)
    if virtual and not any(scheme.generator() for scheme in schemes):
        known = ", ".join(sorted({scheme.id for scheme in schemes}))
        raise UsageError(f"virtual=True: no scheme here generates its indices: {known}")
    together: dict[Any, list[Site]] = {}
    for number, plan in enumerate(plans):
        if plan.scheme:
            alone = None if plan.scheme.whole_network else number
            together.setdefault((alone, plan.scheme, plan.pruning), []).append(plan.site)
    groups = []
    for (_, scheme, pruning), sites in together.items():
        for site in sites:
            initialise_site(site)
        group = Group(scheme, sites, pruning, from_scratch, virtual and scheme.generator() is not None)
        _pin_zeros(group, preserve_sparsity)
        group.scheme.fit(group, importance)
        if group.virtual:
            group.free_dense()
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


@torch.no_grad()
def start_rounds(groups: Sequence[Group], progress: float) -> list[tuple[float, list[Tensor]]]:
    """Let the groups do what is due; give the rounds that begin: where each ends, and the parameters it is about."""
    started: dict[float, list[Tensor]] = {}
    for group in groups:
        end = group.on_step(progress)
        if end is not None:
            started.setdefault(end, []).extend(group.trained())
    return list(started.items())


def penalties(groups: Sequence[Group], task: Tensor) -> Tensor:
    """Give the sum of the schemes' own terms of the loss, 0 where they have none; ``task`` as for their ``penalty``."""
    terms = [term for group in groups if (term := group.scheme.penalty(group, task)) is not None]
    return torch.stack(terms).sum() if terms else torch.zeros(())
