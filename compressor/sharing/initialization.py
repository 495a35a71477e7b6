"""Random weights for a model that was built on ``meta``, where tensors have shapes but no memory."""

from __future__ import annotations

import torch
from torch import nn

from compressor.formats.errors import MissingError
from compressor.sharing.sites import Site

__all__ = ["initialise", "initialise_site"]


def initialise(model: nn.Module) -> None:
    """Allocates all tensors that are on ``meta`` and draws their values by their module's ``reset_parameters()``.

    Modules without tensors on ``meta`` are left untouched.

    Raises:
        MissingError: a module with tensors on ``meta`` has no ``reset_parameters()``.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2, device="meta"), nn.BatchNorm1d(2))
        >>> initialise(model)
        >>> model[0].weight.is_meta, bool(model[0].weight.abs().max() <= 3**-0.5)
        (False, True)
    """
    for name, module in model.named_modules():
        _initialise_module(module, name)


def initialise_site(site: Site) -> None:
    """Initialises the modules that hold a site, as ``initialise`` does; tied tensors stay tied.

    Raises:
        MissingError: as in ``initialise``.
    """
    first, name = site.owners[0]
    for owner, attribute in site.owners:
        owner._parameters[attribute] = first._parameters[name]
        _initialise_module(owner, site.name.removesuffix(name).removesuffix("."))


def _initialise_module(module: nn.Module, name: str) -> None:
    tensors = {**module._parameters, **module._buffers}
    absent = [f"{name}.{key}" if name else key for key, value in tensors.items() if value is not None and value.is_meta]
    if not absent:
        return
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if reset is None:
        kind = type(module).__name__
        raise MissingError(
            f"{absent[0]}: a {kind} on meta has no reset_parameters(): build the model where it has memory"
        )
    module.to_empty(device=torch.get_default_device(), recurse=False)
    reset()
