"""Put groups on a model and take them off again: the only user of ``torch.nn.utils.parametrize``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from compressor.formats.errors import UsageError
from compressor.ops.buffer_pool import give_back
from compressor.sharing.group import Group
from compressor.sharing.sites import Site

__all__ = ["CONTAINER", "attach", "cached_weights", "detach", "restore", "set_weight"]

CONTAINER = "weight_sharing"


class SharedWeight(nn.Module):
    """The parametrisation of one site: master weights in, shared weights out."""

    def __init__(self, group: Group, site: Site) -> None:
        super().__init__()
        self._where = [(group, site)]  # in a list, so that the group is not registered once more
        self.ahead = PrecomputedWeight()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it would compile anew whenever a scheme's state changes
    def forward(self, master: Tensor) -> Tensor:
        """Give the weight the network computes with, in the master's dtype.

        Mixed precision begins after it: these are the very values that the file will hold.
        """
        group, site = self._where[0]
        for weight, given, state in self.ahead:
            if given is master and state == _state(group, master):
                return weight
        with torch.autocast(master.device.type, enabled=False):
            return group.weight(site, master)


class PrecomputedWeight(list[tuple[Tensor, Tensor, Any]]):
    """The weight that was computed before its layer's turn, if one was; from which master weight; in what ``_state``.

    A copy is empty.
    """

    def __reduce__(self) -> tuple[type[PrecomputedWeight], tuple[()]]:
        return PrecomputedWeight, ()


def _state(group: Group, master: Tensor) -> Any:
    """Give all that has to be as it was for a weight to be the one its layer would compute, graph included.

    Those are the thread; how autograd works, and by which hooks it saves tensors, for ``torch.utils.checkpoint`` has to
    meet all that it saves; and how often the parameters were written to, as models do that average them as they go.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    written = [parameter._version for parameter in group._parameters.values() if parameter is not None]
    return get_ident(), torch.is_grad_enabled(), hooks, master._version, written


def _precompute(model: nn.Module, given: Any) -> None:
    """Compute all shared weights before the model computes with them: one after the other, which is faster.

    Between the layers of a network the code that does it has left the processor's caches each time.
    """
    _forget_precomputed(model)  # a pass that Ctrl-C ended has not
    possible = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks") and not torch.compiler.is_compiling()
    if possible and torch.is_grad_enabled():  # in evaluation all weights at once would take memory
        for group, shared, behind in getattr(model, CONTAINER).shared:
            master = behind.original
            weight = shared(master)  # which may put codewords into the master weight, but not through autograd
            shared.ahead[:] = [(weight, master, _state(group, master))]


def _forget_precomputed(model: nn.Module, *given: Any) -> None:
    """Leave nothing of a forward pass to the next."""
    if not torch.compiler.is_compiling():
        for _, shared, _ in getattr(model, CONTAINER).shared:
            shared.ahead.clear()


class Groups(nn.ModuleList):
    """All groups of a model; the identity when called, for a Sequential calls whatever hangs on it."""

    hooks: Sequence[RemovableHandle] = ()
    shared: Sequence[tuple[Group, SharedWeight, Any]] = ()
    """Each weight that is shared, with its group and the list of one parametrisation that holds its master weight."""

    def forward(self, x: Tensor) -> Tensor:
        """Give ``x`` back."""
        return x

    def _load_from_state_dict(self, *given: Any) -> None:
        """Follow parameters that ``load_state_dict(assign=True)`` has put in the place of others.

        The groups are the last module of a model, so that all its parameters are loaded before them.
        """
        super()._load_from_state_dict(*given)
        for group in self:
            assert isinstance(group, Group)
            if group.virtual:  # it has none
                continue
            owners: list[tuple[Any, str]] = [site.owners[0] for site in group.sites]
            group.set_master_weights([module.parametrizations[attribute].original for module, attribute in owners])


def attach(model: nn.Module, groups: Sequence[Group]) -> None:
    """Let the model compute with shared weights; the groups hang in one container module on it."""
    if hasattr(model, CONTAINER):
        raise UsageError("the model is being compressed already: finish() or undo() that first")
    sites = [(group, site) for group in groups for site in group.sites]
    shared = [(group, *_share(group, site, owner)) for group, site in sites for owner in site.owners]
    model.add_module(CONTAINER, container := Groups(groups))
    container.shared = shared
    container.hooks = [
        model.register_forward_pre_hook(_precompute),
        model.register_forward_hook(_forget_precomputed, always_call=True),
    ]


def _share(group: Group, site: Site, owner: tuple[Any, str]) -> tuple[SharedWeight, nn.Module]:
    module, attribute = owner
    shared = SharedWeight(group, site)
    with _order_kept(module):
        # unsafe: shape and dtype stay as they are by construction, so the trial run is spared
        parametrize.register_parametrization(module, attribute, shared, unsafe=True)
    return shared, module.parametrizations[attribute]


def detach(model: nn.Module) -> None:
    """Take all groups off: same Parameter objects, classes and state-dict order as before, master values."""
    for hook in getattr(model, CONTAINER).hooks:
        hook.remove()
    for group in getattr(model, CONTAINER):
        for site in group.sites:
            for module, attribute in site.owners:
                order = module.__dict__.pop("_order_before_sharing", None)
                _own_class(module)
                parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
                for name in order or ():
                    if name in module._parameters:
                        module._parameters[name] = module._parameters.pop(name)
    delattr(model, CONTAINER)
    give_back()


def _own_class(module: nn.Module) -> None:
    """Give a module a parametrised class of its own: torch's deep copies share theirs, which removal changes."""
    shared = type(module)
    body = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, body)


def restore(model: nn.Module, groups: Sequence[Group], dense: Mapping[str, Tensor]) -> None:
    """Take all groups off and set the weights to those given by name; raises UsageError where some are gone."""
    sites = [site for group in groups for site in group.sites]
    for site in sites:
        if site.name not in dense:
            raise UsageError(f"undo(): the dense weights of {site.name} have not been kept: prepare(virtual=True)")
    detach(model)
    for site in sites:
        set_weight(site, dense[site.name])


@contextmanager
def _order_kept(module: nn.Module) -> Iterator[None]:
    """Remember the order of the module's parameters, which removal would otherwise change."""
    module.__dict__.setdefault("_order_before_sharing", list(module._parameters))
    yield


@contextmanager
def cached_weights() -> Iterator[None]:
    """Compute each shared weight once inside: some layers read theirs several times in a forward pass."""
    with parametrize.cached():
        yield


def set_weight(site: Site, value: Tensor) -> None:
    """Set a site's tensor in place, all owners with it; one that was virtual gets its memory back."""
    with torch.no_grad():
        if site.tensor.shape != value.shape:
            site.tensor.data = site.tensor.new_empty(value.shape)
        site.tensor.copy_(value)
