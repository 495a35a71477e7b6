"""The module that is worked on: out of its torch.compile wrapper, of a kind that can be trained, and copied."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from compressor.formats.errors import UsageError

__all__ = ["check_trainable", "checked_module", "copy_module"]

REMEDIES: dict[type, str] = {
    BasePruningMethod: "torch.nn.utils.prune.remove({module}, {name!r}) first; preserve_sparsity=True keeps the zeros",
    WeightNorm: "torch.nn.utils.remove_weight_norm({module}, {name!r}) first",
    SpectralNorm: "torch.nn.utils.remove_spectral_norm({module}, {name!r}) first",
}
"""The call that makes an ordinary parameter of a weight that a hook computes, by the hook's class."""


def checked_module(model: object) -> nn.Module:
    """Returns the module of a model that can be trained: the original one of ``torch.compile``, else the model itself.

    Raises:
        UsageError: it is no module, or was compiled by ``torch.jit`` or ``torch.export``, or is lazy.
    """
    while isinstance(model, nn.Module) and _is_of(model, "torch._dynamo"):
        model = model._orig_mod  # the parameters are the same
    if _is_of(model, "torch.export"):
        raise UsageError("the model comes from torch.export, which has no layers: pass the module that was exported")
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise UsageError(f"the model must be a torch.nn.Module, got {kind}; of a timm name, timm.create_model(NAME)")
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError("the model is TorchScript, which has no layers: pass the module that torch.jit was given")
    for name, tensor in _tensors(model):
        if is_lazy(tensor):
            raise UsageError(f"{name} of a lazy module has no shape yet: run model(inputs) on one batch first")
    return model


def _is_of(model: object, package: str) -> bool:
    """Returns whether a model is of a class of a package, which takes long to import and need not be."""
    return any(kind.__module__.startswith(package) for kind in type(model).__mro__)


def copy_module(model: nn.Module) -> nn.Module:
    """Returns a deep copy of a model.

    Raises:
        UsageError: it cannot be copied; the message has the call that helps.
    """
    try:
        return copy.deepcopy(model)
    except Exception as exc:  # copying calls code of all that the model refers to
        raise UsageError(f"{type(model).__name__} cannot be copied: {_remedy(model, exc)}") from exc


def check_trainable(model: nn.Module) -> None:
    """Checks that the tensors of a model may be changed in place.

    Raises:
        UsageError: some were made in ``torch.inference_mode``.
    """
    for name, tensor in _tensors(model):
        if tensor.is_inference():
            raise UsageError(
                f"{name} was made in torch.inference_mode and cannot be trained: build and load the model outside of "
                "it, or pass copy=True"
            )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _remedy(model: nn.Module, error: Exception) -> str:
    for path, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            for kind, remedy in REMEDIES.items():
                if isinstance(hook, kind):
                    name = getattr(hook, "_tensor_name", None) or getattr(hook, "name", "weight")
                    held = f"model.get_submodule({path!r})" if path else "model"
                    return remedy.format(module=held, name=name)
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                where = f"{path}.{name}" if path else name
                return f"{where} is the result of a computation: keep {where}.detach() there"
    reason = " ".join(str(error).split())[:150]
    return f"{reason or type(error).__name__}; with copy=False and teacher=None the model itself is worked on"
