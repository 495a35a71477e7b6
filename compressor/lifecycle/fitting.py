"""Fitting: groups for a model at a price, and the search for the price that a target asks for."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from compressor.calibration.measurement import Measurement
from compressor.data.batches import Batches
from compressor.formats.content import Content
from compressor.formats.errors import PolicyError, UsageError
from compressor.formats.file.writer import pack
from compressor.lifecycle.convert import convert, halvable, holding_state
from compressor.lifecycle.drop_control import DropControl, TopOneDrop
from compressor.lifecycle.norms import FoldedNorms, fold_norms, norm_inputs
from compressor.lifecycle.packed import Packed, SharedModel, content_of
from compressor.lifecycle.prepare import fit_groups
from compressor.lifecycle.size_control import SizeControl, coded_bytes
from compressor.lifecycle.target import (
    MOST_RATE,
    FileOptions,
    PlainSizes,
    Search,
    Target,
    find_rate_for_drop,
    find_rate_for_size,
)
from compressor.policy.policy import Policy, Rule, TensorPlan
from compressor.sharing.code_length import is_priced
from compressor.sharing.group import Group
from compressor.sharing.parametrization import attach, detach, restore, set_weight, without_groups

__all__ = ["Fitting", "check_target", "policy_for"]

ANY_RATE = 1e-7  # of a policy whose price is searched for
UNKNOWN = 99_999_999  # stands for predicted bytes whose number of digits is not known yet
FINER_PRICE = 0.5  # of the price that a size asks for, at which training to it begins: about 1.3 times the bytes
FAR = 0.04  # nats, the divergence of post-training from which on that gains anything
LEAST_STEPS = 2_500  # of a training that brings the file down from there; one of 900 did not
MARGIN = 12  # bytes by which facts that are not known yet may deflate worse than what stands for them
NAMES_MARGIN = 24  # bytes by which names of labels may deflate worse beside other facts
NORMS_MARGIN = 1 / 80  # of a byte, for each value of a norm that may change when statistics are estimated anew


def policy_for(policy: Policy | None, target: Target) -> Policy:
    """Returns the policy, or ``learnt`` for everything where only a target is given.

    Raises:
        UsageError: neither is given, or the policy is something else.
    """
    if not isinstance(policy, Policy | None):
        raise UsageError(f"policy: expected a Policy, got {reprlib.repr(policy)}: write Policy([Rule('*', 'learnt')])")
    if policy is None and not target.is_given:
        raise UsageError("policy: name the rules, or give rate, target_size, target_bits or max_drop")
    return Policy([Rule("*", scheme="learnt", rate=ANY_RATE)]) if policy is None else policy


def check_target(target: Target, plans: Sequence[TensorPlan]) -> None:
    """Checks that something in a policy has a price, where a target asks for one.

    Raises:
        PolicyError: nothing has, or what has one cannot have it under its other settings.
    """
    schemes = sorted({plan.scheme.id for plan in plans if plan.scheme})
    if target.is_given:
        plans_at(plans, ANY_RATE)
    if target.is_given and not any(plan.scheme and plan.scheme.has_price for plan in plans):
        raise PolicyError(f"a target needs a scheme with a price, such as learnt: {', '.join(schemes)} has none")


@dataclass
class Fitting:
    """Fits the groups of a model, at any price, always from its dense weights.

    Args:
        shared: the model and the settings of its training; ``plans`` say what is shared.
        dense: the dense weights of the sites by name.
        measured: what is measured of the model; None: nothing, and all errors cost alike.
        preserve_sparsity, from_scratch, virtual: as in ``fit_groups``.
        options: how the file will be written.
    """

    shared: SharedModel
    dense: Mapping[str, Tensor]
    measured: Measurement | None = None
    preserve_sparsity: bool = False
    from_scratch: bool = False
    virtual: bool = False
    options: FileOptions = field(default_factory=FileOptions)
    _norms: FoldedNorms = field(default_factory=FoldedNorms, init=False)  # of the last price
    _names: int | None = field(default=None, init=False)  # bytes that names of labels take
    _drop: TopOneDrop | None = field(default=None, init=False)  # where the target is one
    _sources: dict[str, nn.Module] | None = field(default=None, init=False)  # as ``norm_inputs`` returns them
    _coded: float | None = field(default=None, init=False)  # bytes of indices of the file found; None: as of the groups

    def at(self, rate: float | None, measured: bool = True) -> list[Group]:
        """Returns groups fitted at a price.

        Args:
            rate: the price of a bit; None: what the settings of the schemes say.
            measured: whether the curvature counts.
        """
        if rate is not None:
            self._restore_dense()  # error feedback has changed them
        plans = self.shared.plans if rate is None else plans_at(self.shared.plans, rate)
        calibrator = self.measured.calibrator if measured and self.measured else None
        return fit_groups(plans, calibrator, self.preserve_sparsity, self.from_scratch, self.virtual)

    def search(self, target: Target, val: Batches | None) -> tuple[list[Group], Search]:
        """Returns groups fitted at the price that a target asks for.

        Args:
            target: what is asked for.
            val: batches (inputs, targets) to measure accuracy on; None where the target needs none.

        Raises:
            UsageError: the target cannot be reached.
        """
        groups: list[Group] = []
        if target.drop is not None:
            self._drop = TopOneDrop(val, self.shared.model)

        def size_at(rate: float) -> int:
            groups[:] = self.at(rate)
            return self.size(target, groups, rate)

        try:
            found = self._found(target, groups, size_at)
        except BaseException:
            self._restore_dense()
            raise
        if any(group.pruning is not None or not group.scheme.has_price for group in groups):
            self._coded = coded_bytes(groups)  # of the file that was found: pruning may be gradual
            groups[:] = self.at(found.rate)  # measuring the size has ended their rounds
        return groups, found

    def control(self, target: Target, groups: Sequence[Group], found: Search) -> SizeControl | None:
        """Returns what holds size or accuracy in training; None where a price is asked for, or nothing has a price.

        Args:
            target: what is asked for.
            groups: of the model.
            found: what the search has found.
        """
        size = target.bytes(self._weights)
        if target.rate is not None or not any(is_priced(group) and not group.frozen for group in groups):
            return None
        size_of = partial(self.size, target, groups, found.rate)
        measure = None if self._coded is not None else partial(self._size_of_copy, target, groups, found.rate)
        if size is not None:
            curvature = None if self.measured is None else self.measured.diagonal
            return SizeControl(groups, size, found.size, size_of, self._coded, measure, curvature)
        assert target.drop is not None
        assert self._drop is not None
        return DropControl(groups, found.size, size_of, self._coded, measure, target.drop, self._drop.dense)

    def finer(
        self, target: Target, groups: Sequence[Group], found: Search | None, steps: int, done: int
    ) -> tuple[list[Group], Search] | None:
        """Returns groups of finer grids than a size asks for, and their price; None: training is to begin as it is.

        Training takes them down to the size. It begins with a network that answers better, where post-training to that
        size has taken the answers to the calibration images far from the dense ones: docs/decisions/0023.

        Args:
            target: what is asked for.
            groups: that the search has found, on the model; they are taken off it where others are returned.
            found: what the search has found; None: there was none.
            steps: of the training.
            done: steps before it: a training that goes on keeps its grids.
        """
        size, suits = target.bytes(self._weights), not self.from_scratch and all(map(_is_driven_by_price, groups))
        if done or size is None or found is None or found.size > size or steps < LEAST_STEPS or not suits:
            return None
        if self.measured is None or self.measured.reference.loss(self.shared.model) < FAR:
            return None
        model, rate = self.shared.model, found.rate * FINER_PRICE
        masters = {site: group.master_weight(site).detach().clone() for group in groups for site in group.sites}
        device = next(model.parameters()).device
        detach(model)
        try:
            model.to(self.measured.calibrator.batches[0].device)  # to evaluate it, it may have been moved from there
            fitted = self.at(rate)
            return fitted, replace(found, rate=rate, size=self.size(target, fitted, rate))
        except BaseException:  # such as Ctrl-C: the job stays as it was
            model.to(device)
            for site, master in masters.items():
                set_weight(site, master)
            attach(model, groups)
            raise

    def _size_of_copy(self, target: Target, groups: Sequence[Group], rate: float) -> int:
        """Returns what ``size`` does in training, of a copy: it goes on with the groups and the hooks that it has."""
        kept = {id(one): one for one in (self.dense, self.measured, self.shared.original)}
        fitting, copies = deepcopy((replace(self), groups), kept)  # replaced: without modules that were found
        return fitting.size(target, copies, rate, trained=True)

    @property
    def _weights(self) -> int:
        """The number of weights that are shared."""
        return sum(plan.site.tensor.numel() for plan in self.shared.plans if plan.scheme)

    def _found(
        self,
        target: Target,
        groups: Sequence[Group],
        size_at: Callable[[float], int],
    ) -> Search:
        """Returns the price that a target asks for; ``groups`` are those of the last call of ``size_at``."""
        size = target.bytes(self._weights)
        if target.rate is not None:
            return Search(target.rate, None, size_at(target.rate), 1)
        if size is not None:
            floor = self.size(target, self.at(MOST_RATE, measured=False), MOST_RATE)
            return find_rate_for_size(size, floor, self._plain_sizes(), size_at)
        assert target.drop is not None
        assert self._drop is not None
        measure = self._drop
        return find_rate_for_drop(target.drop, size_at, lambda: self._lost(groups, measure))

    @torch.no_grad()
    def _restore_dense(self) -> None:
        for plan in self.shared.plans:
            if plan.scheme and plan.site.name in self.dense:
                plan.site.tensor.copy_(self.dense[plan.site.name])

    def _plain_sizes(self) -> PlainSizes:
        sites = [plan.site for plan in self.shared.plans if plan.scheme and plan.scheme.has_price]
        known = None if self.measured is None else self.measured.calibrator
        curvature = None if known is None else {site: float(known.diagonal(site).double().mean()) for site in sites}
        return PlainSizes({site: self.dense[site.name] for site in sites}, curvature)

    def size(
        self,
        target: Target,
        groups: Sequence[Group],
        rate: float,
        half: bool | None = None,
        fold: bool | None = None,
        trained: bool = False,
    ) -> int:
        """Returns the bytes of the file, were the model packed with these groups as they are.

        Args:
            target: what is asked for.
            groups: of the model, whether or not they are attached.
            rate: the price of a bit that the file names.
            half, fold: as in ``FileOptions.chosen``.
            trained: whether the model has been trained with these groups.
        """
        half, fold = self.options.chosen(target, half, fold)
        tensors, books, values = convert(groups)
        model, policy = self.shared.model, self.shared.policy.priced(rate)
        by_name = {site.name: value for site, value in values.items()}
        with without_groups(model, groups), holding_state(model, by_name):
            self._norms = self._folded(rate, trained) if fold else FoldedNorms()
            tensors, books = self._norms.added_to(tensors, books)
            with holding_state(model, self._norms.values):  # the noise that is noted is that of the values
                halved = halvable(model, tensors) if half else frozenset()
                shared = replace(self.shared, tensors=tensors, books=books, halved=halved, policy=policy)
                packed = Packed(content_of(shared))
        facts = {} if self.measured is None else {"calibration": self.measured.facts}
        packed.note(**{**facts, "target": {"rate": rate, "predicted": target.size or UNKNOWN}, **self.options.notes})
        norms = sum(value.numel() for value in self._norms.values.values())
        return self._size_of(packed.content) + MARGIN + math.ceil(NORMS_MARGIN * norms)

    def _folded(self, rate: float, trained: bool) -> FoldedNorms:
        """Returns what folding makes of the norms; the convolutions before them are found once."""
        model = self.shared.model
        if self._sources is None and self.measured is not None:
            self._sources = norm_inputs(model, self.measured.calibrator.batches[0][:1])
        return fold_norms(model, self.shared.plans, rate, self.measured, self._sources, trained)

    def _size_of(self, content: Content) -> int:
        """Returns the bytes of a file; those of label names, which take long to deflate, are measured once."""
        rest = {key: value for key, value in (content.preprocessing or {}).items() if key != "label_names"}
        size = len(pack(replace(content, preprocessing=rest or None), self.options.codec))
        if rest.keys() == (content.preprocessing or {}).keys():
            return size
        if self._names is None:
            self._names = len(pack(content, self.options.codec)) - size
        return size + self._names + NAMES_MARGIN

    def _lost(self, groups: Sequence[Group], drop: Callable[[nn.Module], float]) -> float:
        """Returns the points of top-1 that the model loses by these groups."""
        model = self.shared.model
        masters = {site.name: site.tensor.detach().clone() for group in groups for site in group.sites}
        attach(model, groups)
        try:
            with holding_state(model, self._norms.values):
                return drop(model)
        finally:
            restore(model, groups, masters)


def _is_driven_by_price(group: Group) -> bool:
    """Whether a price alone says how many bits a group takes in training: nothing is pruned and nothing frozen."""
    is_trained = all(group.master_weight(site).requires_grad for site in group.sites)
    return is_priced(group) and group.pruning is None and is_trained


def plans_at(plans: Sequence[TensorPlan], rate: float) -> list[TensorPlan]:
    """Returns plans whose schemes have this price, where they have one."""
    return [
        replace(plan, scheme=plan.scheme.priced(rate)) if plan.scheme and plan.scheme.has_price else plan
        for plan in plans
    ]
