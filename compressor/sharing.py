"""Put groups on a model and take them off again: the only user of ``torch.nn.utils.parametrize``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from compressor.formats.errors import UsageError
from compressor.group import Group
from compressor.sites import Site

__all__ = ["CONTAINER", "attach", "cached_weights", "detach", "restore", "set_weight"]

CONTAINER = "weight_sharing"


class SharedWeight(nn.Module):
    """The parametrisation of one site: latent weights in, shared weights out."""

    def __init__(self, group: Group, site: Site) -> None:
        super().__init__()
        self._where = [(group, site)]  # in a list, so that the group is not registered once more
        self.ahead = Ahead()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it would compile anew whenever a scheme's state changes
    def forward(self, latent: Tensor) -> Tensor:
        """Give the weight the network computes with, in the latent's dtype.

        Mixed precision begins after it: these are the very values that the file will hold.
        """
        for weight, saving in self.ahead:
            if saving == _saving():
                return weight
        group, site = self._where[0]
        with torch.autocast(latent.device.type, enabled=False):
            return group.weight(site, latent)


class Ahead(list[tuple[Tensor, Any]]):
    """The weight that was computed before its layer's turn, if so, and what ``_saving`` was; a copy is empty."""

    def __reduce__(self) -> tuple[type[Ahead], tuple[()]]:
        return Ahead, ()


def _saving() -> Any:
    """The hooks by which autograd saves tensors now: ``torch.utils.checkpoint`` has to meet all that it saves."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def _compute_ahead(model: nn.Module, given: Any) -> None:
    """Compute all shared weights before the model computes with them: one after the other, which is faster.

    Between the layers of a network the code that does it has left the processor's caches each time.
    """
    del given
    possible = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks") and not torch.compiler.is_compiling()
    if possible and torch.is_grad_enabled():  # without gradients a weight is gone when its layer is done
        for shared, original in _shared_weights(model):
            shared.ahead[:] = [(shared(original), _saving())]


def _forget_ahead(model: nn.Module, *given: Any) -> None:
    """Leave nothing of a forward pass to the next."""
    del given
    for shared, _ in _shared_weights(model):
        shared.ahead.clear()


def _shared_weights(model: nn.Module) -> Iterator[tuple[SharedWeight, Tensor]]:
    for group in getattr(model, CONTAINER):
        for site in group.sites:
            for module, attribute in site.owners:
                shared = module.parametrizations[attribute]
                yield shared[0], shared.original


class Groups(nn.ModuleList):
    """All groups of a model; the identity when called, for a Sequential calls whatever hangs on it."""

    hooks: Sequence[RemovableHandle] = ()

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
            group.set_latents([module.parametrizations[attribute].original for module, attribute in owners])


def attach(model: nn.Module, groups: Sequence[Group]) -> None:
    """Let the model compute with shared weights; the groups hang in one container module on it."""
    if hasattr(model, CONTAINER):
        raise UsageError("the model is being compressed already: finish() or undo() that first")
    for group in groups:
        for site in group.sites:
            for module, attribute in site.owners:
                with _order_kept(module):
                    # unsafe: shape and dtype stay as they are by construction, so the trial run is spared
                    parametrize.register_parametrization(module, attribute, SharedWeight(group, site), unsafe=True)
    model.add_module(CONTAINER, container := Groups(groups))
    container.hooks = [
        model.register_forward_pre_hook(_compute_ahead),
        model.register_forward_hook(_forget_ahead, always_call=True),
    ]


def detach(model: nn.Module) -> None:
    """Take all groups off: same Parameter objects, classes and state-dict order as before, latent values."""
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
