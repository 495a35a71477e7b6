"""Puts groups on a model and takes them off again: the only user of ``torch.nn.utils.parametrize``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from compressor.formats.errors import UsageError
from compressor.ops.buffer_pool import BufferPool
from compressor.sharing.group import Group
from compressor.sharing.precomputed import PrecomputedWeight, can_precompute
from compressor.sharing.sites import Site

__all__ = [
    "CONTAINER",
    "attach",
    "cached_weights",
    "check_not_shared",
    "detach",
    "release_buffers",
    "restore",
    "set_weight",
    "without_groups",
]

CONTAINER = "weight_sharing"


class SharedWeight(nn.Module):
    """The parametrisation of one site: it maps master weights to shared weights.

    Args:
        group: of the site.
        site: whose weights are computed.
        pool: of the model, where the memory of weights and gradients comes from.
    """

    def __init__(self, group: Group, site: Site, pool: BufferPool) -> None:
        super().__init__()
        self._source = [(group, site)]  # in a list, so that the group is not registered a second time
        self.pool = pool
        self.precomputed = PrecomputedWeight()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it would recompile whenever a scheme's state changes
    def forward(self, master: Tensor) -> Tensor:
        """Returns the weight the network computes with, in the master weight's dtype.

        Autocast is off inside: these are the very values that the file will hold.
        """
        group, site = self._source[0]
        weight = self.precomputed.take(group, master)
        if weight is not None:
            return weight
        with torch.autocast(master.device.type, enabled=False), self.pool.activate():
            return group.weight(site, master)


def _precompute(model: nn.Module, inputs: Any) -> None:
    """Computes all shared weights of a model before its forward pass."""
    _clear_precomputed(model)  # a forward pass that Ctrl-C has ended did not
    if can_precompute():
        for group, shared, holder in getattr(model, CONTAINER).shared:
            shared.precomputed.compute(shared, group, holder.original)


def _clear_precomputed(model: nn.Module, *call: Any) -> None:
    """Forgets the weights after the forward pass they were computed for."""
    if not torch.compiler.is_compiling():
        for _, shared, _ in getattr(model, CONTAINER).shared:
            shared.precomputed.clear()


class Groups(nn.ModuleList):
    """All groups of a model; the identity when called, for an ``nn.Sequential`` calls each of its children.

    Args:
        groups: of the model.
        pool: where the memory of its weights and gradients comes from.
    """

    hooks: Sequence[RemovableHandle] = ()
    shared: Sequence[tuple[Group, SharedWeight, Any]] = ()
    """Each shared weight with its group and the ``ParametrizationList`` that holds its master weight."""

    def __init__(self, groups: Sequence[Group], pool: BufferPool) -> None:
        super().__init__(groups)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``x``."""
        return x

    def _load_from_state_dict(self, *args: Any) -> None:
        """Follows parameters that ``load_state_dict(assign=True)`` has replaced.

        The groups are the last module of a model, so that all its parameters are loaded before them.
        """
        super()._load_from_state_dict(*args)
        for group in self:
            assert isinstance(group, Group)
            if group.virtual:  # it has no master weights
                continue
            owners: list[tuple[Any, str]] = [site.owners[0] for site in group.sites]
            group.set_master_weights([module.parametrizations[attribute].original for module, attribute in owners])


def check_not_shared(model: nn.Module) -> None:
    """Checks that neither the model nor a part of it has groups.

    Raises:
        UsageError: one has.
    """
    if any(hasattr(module, CONTAINER) for module in model.modules()):
        raise UsageError("the model is being compressed already: finish() or undo() that first")


def attach(model: nn.Module, groups: Sequence[Group]) -> None:
    """Makes a model compute with shared weights; the groups become one container module of it.

    Raises:
        UsageError: the model has groups already.
    """
    check_not_shared(model)
    pool = BufferPool()
    sites = [(group, site) for group in groups for site in group.sites]
    shared = [
        (group, *_parametrize(SharedWeight(group, site, pool), owner)) for group, site in sites for owner in site.owners
    ]
    model.add_module(CONTAINER, container := Groups(groups, pool))
    container.shared = shared
    recurrent = {module for _, site in sites for module, _ in site.owners if isinstance(module, nn.RNNBase)}
    container.hooks = [
        model.register_forward_pre_hook(_precompute),
        model.register_forward_hook(_clear_precomputed, always_call=True),
        *(module.register_forward_hook(_forget_flat_weights, always_call=True) for module in recurrent),
    ]


def _parametrize(shared: SharedWeight, owner: tuple[Any, str]) -> tuple[SharedWeight, nn.Module]:
    module, attribute = owner
    # Removing a parametrisation puts the parameter at the end: detach() restores the order that is kept here.
    module.__dict__.setdefault("_order_before_sharing", list(module._parameters))
    # unsafe: shape and dtype stay the same by construction, so the check by a trial call is spared
    parametrize.register_parametrization(module, attribute, shared, unsafe=True)
    return shared, module.parametrizations[attribute]


def _forget_flat_weights(module: nn.Module, *call: Any) -> None:
    """Makes a recurrent layer ask for its weights anew in its next forward pass.

    It keeps those of the last one in a list. They have a graph behind them, which would stay in memory, and a module
    that keeps such tensors cannot be deep-copied.
    """
    assert isinstance(module, nn.RNNBase)
    names = module._flat_weights_names
    module.__dict__["_flat_weights"] = [None for _ in names]
    module.__dict__["_flat_weight_refs"] = [_no_weight for _ in names]  # unlike any weight: they count as changed


def _no_weight() -> None:
    """Returns None, as a weak reference does to what is gone."""


def detach(model: nn.Module) -> None:
    """Takes all groups off a model: Parameter objects, classes and state-dict order are those from before ``attach``.

    The parameters have the values of the master weights.
    """
    for hook in getattr(model, CONTAINER).hooks:
        hook.remove()
    owners = [owner for group in getattr(model, CONTAINER) for site in group.sites for owner in site.owners]
    for module, attribute in owners:
        _separate_class(module)
        parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
    for module, _ in owners:
        for name in module.__dict__.pop("_order_before_sharing", ()):
            if name in module._parameters:
                module._parameters[name] = module._parameters.pop(name)
    release_buffers(model)
    delattr(model, CONTAINER)


@contextmanager
def without_groups(model: nn.Module, groups: Sequence[Group]) -> Iterator[None]:
    """Takes the groups off a model inside, where it has them; its parameters are then the master weights."""
    if not hasattr(model, CONTAINER):
        yield
        return
    detach(model)
    try:
        yield
    finally:
        attach(model, groups)


def _separate_class(module: nn.Module) -> None:
    """Copies a module's parametrised class: deep copies by PyTorch share it, and removal changes it."""
    cls = type(module)
    body = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, cls.__bases__, body)


def release_buffers(model: nn.Module) -> None:
    """Frees the memory that a model's pool keeps for the next step; a model without shared weights has none."""
    container = getattr(model, CONTAINER, None)
    if container is not None:
        container.pool.release()


def restore(model: nn.Module, groups: Sequence[Group], dense: Mapping[str, Tensor]) -> None:
    """Takes all groups off a model and sets its weights to dense ones.

    Args:
        model: that has the groups.
        groups: of the model.
        dense: the weights by site name.

    Raises:
        UsageError: some of the weights were not kept.
    """
    sites = [site for group in groups for site in group.sites]
    for site in sites:
        if site.name not in dense:
            raise UsageError(f"undo(): the dense weights of {site.name} have not been kept: prepare(virtual=True)")
    detach(model)
    for site in sites:
        set_weight(site, dense[site.name])


@contextmanager
def cached_weights() -> Iterator[None]:
    """Computes each shared weight once inside: some layers read theirs several times in a forward pass."""
    with parametrize.cached():
        yield


def set_weight(site: Site, value: Tensor) -> None:
    """Sets a site's tensor in place, for all its owners; one without memory, as in a virtual group, gets some."""
    with torch.no_grad():
        if site.tensor.shape != value.shape:
            site.tensor.data = site.tensor.new_empty(value.shape)
        site.tensor.copy_(value)
