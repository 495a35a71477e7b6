"""Preparation: from the plan of a policy to fitted groups, and what all groups do as training progresses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from compressor.calibration.calibrator import Calibrator
from compressor.formats.errors import PolicyError, UsageError
from compressor.policy.policy import TensorPlan
from compressor.sharing.curvature import Curvature
from compressor.sharing.group import Group
from compressor.sharing.initialization import initialise_site
from compressor.sharing.sites import Site, padding_rows

__all__ = [
    "OnRound",
    "advance",
    "check_zeros",
    "fit_groups",
    "forget_generated",
    "not_shared",
    "penalties",
    "start_rounds",
]

OnRound = Callable[[list[Tensor], int], None]
"""Of the parameters that begin a round, and the steps that the round has."""


_log = logging.getLogger(__name__)


def forget_generated(plans: Sequence[TensorPlan], dense: dict[str, Tensor]) -> None:
    """Drops the dense weights of tensors whose scheme generates its indices, which a virtual model does without.

    Args:
        plans: of a policy.
        dense: the dense weights by name, changed in place.
    """
    for plan in plans:
        if plan.scheme and plan.scheme.generator():
            dense.pop(plan.site.name, None)


def fit_groups(
    plans: Sequence[TensorPlan],
    calibrator: Calibrator | None = None,
    preserve_sparsity: bool = False,
    from_scratch: bool = False,
    virtual: bool = False,
) -> list[Group]:
    """Creates and fits a group for each shared tensor, or for all tensors of a scheme that spans the network.

    Tensors with ``requires_grad_(False)`` have groups of their own, which are frozen: their values are final.

    Args:
        plans: what the policy plans for each tensor.
        calibrator: measures what errors cost, of each tensor after those that the model uses before it have been
            compressed; None: all errors cost alike. Tensors that share a codebook are measured in the dense model.
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
    fitted: dict[Any, Group] = {}
    for keys, curvature in _curvatures(grouped, calibrator, fitted):
        for key in keys:
            (_, scheme, pruning, frozen), sites = key, grouped[key]
            for site in sites:
                initialise_site(site)
            group = Group(scheme, sites, pruning, from_scratch, virtual and scheme.generator() is not None)
            _pin_zeros(group, preserve_sparsity)
            group.scheme.fit(group, curvature)
            if frozen:
                group.freeze()
            if group.virtual:
                group.free_dense()
            fitted[key] = group
    return [fitted[key] for key in grouped]


def _curvatures(
    grouped: Mapping[Any, list[Site]], calibrator: Calibrator | None, fitted: Mapping[Any, Group]
) -> Iterator[tuple[list[Any], Mapping[Site, Curvature] | None]]:
    """Yields the keys of groups that are to be fitted next, and the curvature of their tensors.

    Args:
        grouped: the sites of each group.
        calibrator: what measures; None: nothing is measured, and all groups come at once.
        fitted: the groups that have been fitted meanwhile.
    """
    if calibrator is None:
        yield list(grouped), None
        return
    several = [key for key, sites in grouped.items() if len(sites) > 1]
    single = {sites[0]: key for key, sites in grouped.items() if len(sites) == 1}
    for key in several:
        yield [key], {site: calibrator.of_dense(site) for site in grouped[key]}
    compressed: dict[str, Tensor] = {}
    done: set[Any] = set()
    for chunk in calibrator.site_chunks():
        sites = [site for site in chunk if site in single]
        for key in [key for key in fitted if key not in done]:
            compressed |= _present_weights(fitted[key])
            done.add(key)
        if sites:
            yield [single[site] for site in sites], calibrator.measure(sites, compressed)


@torch.no_grad()
def _present_weights(group: Group) -> dict[str, Tensor]:
    """Returns what the model computes with for the tensors of a group, by name; of virtual ones nothing."""
    if group.virtual:
        return {}
    return {site.name: group.weight(site, group.master_weight(site).detach()).clone() for site in group.sites}


def check_zeros(plans: Sequence[TensorPlan], preserve_sparsity: bool) -> None:
    """Checks that no weight that is zero has to stay so where the scheme cannot do that.

    Raises:
        PolicyError: some have.
    """
    for plan in plans:
        cannot = plan.scheme is not None and not plan.scheme.can_prune and not plan.site.tensor.is_meta
        if cannot and bool(_zeros(plan.site, preserve_sparsity).any()):
            why = "pruned weights" if preserve_sparsity else "a row of padding"
            what = f"{plan.site.name} has {why}, and {plan.scheme} cannot fix single weights to zero"
            raise PolicyError(f"{what}: change its settings, or ignore the tensor by a rule")


def _zeros(site: Site, preserve_sparsity: bool) -> Tensor:
    """Returns which weights are zero and have to stay so, bool[shape]: all, or those that stand for padding."""
    zeros = site.tensor.detach() == 0
    if not preserve_sparsity:
        padding = torch.zeros(len(zeros), *[1] * (zeros.ndim - 1), dtype=torch.bool, device=zeros.device)
        padding[list(padding_rows(site))] = True
        zeros &= padding
    return zeros


def _pin_zeros(group: Group, preserve_sparsity: bool) -> None:
    """Prunes the weights that are zero, if asked, and in any case the zeros that stand for padding in embeddings.

    Raises:
        UsageError: a virtual group is pruned, whose mask would be as large as its dense weights.
    """
    zeros = {site: _zeros(site, preserve_sparsity) for site in group.sites if preserve_sparsity or padding_rows(site)}
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


def advance(
    groups: Sequence[Group], optimizer: Optimizer, steps: int, total_steps: int, on_round: OnRound | None
) -> None:
    """Advances all groups to a step of the training; parameters that begin a round lose the optimiser's state.

    Args:
        groups: the groups of the model.
        optimizer: of all that is trained.
        steps, total_steps: done, and of the whole training.
        on_round: called for each round that begins.
    """
    progress = min(1.0, steps / total_steps)
    for end, parameters in start_rounds(groups, progress):
        for parameter in parameters:
            optimizer.state.pop(parameter, None)
        if on_round is not None:
            on_round(parameters, max(1, round((end - progress) * total_steps)))


def penalties(groups: Sequence[Group], task: Tensor) -> Tensor:
    """Returns the sum of the schemes' penalties on the loss, 0 if there are none.

    Args:
        groups: the groups of the model.
        task: the loss of the task, as for ``Scheme.penalty``.
    """
    terms = [term for group in groups if not group.frozen and (term := group.scheme.penalty(group, task)) is not None]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def not_shared(call: str, is_finished: bool) -> UsageError:
    """Returns the error of a call that needs groups, before ``prepare()`` or after ``finish()``."""
    if is_finished:
        return UsageError(f"{call} after finish(): the model is an ordinary module again, make a new Compressor")
    return UsageError(f"{call} needs prepare() before it")
