"""The state of a model that a packed file can hold."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from compressor.formats.errors import FormatError, UsageError
from compressor.formats.file.fields import parse_name, parse_shape
from compressor.formats.torch_tensors import SAFETENSORS_NAMES

__all__ = ["kept_weights", "state_to_pack", "tensors_of"]


def state_to_pack(model: nn.Module, meta: bool = False) -> dict[str, Tensor]:
    """Returns the state dict of a model, after checking that a packed file can hold all of it.

    Args:
        model: an ordinary module.
        meta: whether tensors on ``meta``, which get their values later, are allowed.

    Raises:
        UsageError: a state is no tensor, or one of another dtype, layout or shape than the format has, or its name has
            spaces.
    """
    states = model.state_dict()
    for name, value in states.items():
        if not isinstance(value, Tensor):
            raise UsageError(f"state {name!r} is a {type(value).__name__}, not a tensor: it cannot be packed")
        if value.dtype not in SAFETENSORS_NAMES or value.layout is not torch.strided or (value.is_meta and not meta):
            kind = "meta" if value.is_meta and not meta else f"{value.layout} {value.dtype}"
            raise UsageError(f"{name}: a {kind} tensor cannot be packed; make it a dense one of a common dtype")
        try:
            parse_name(name)
            parse_shape(list(value.shape), repr(name))
        except FormatError as error:
            raise UsageError(f"cannot be packed: {error}") from None
    return dict(states)


def kept_weights(weights: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns weights that training will not change, by name: those that are kept anyway, and clones of the others.

    Args:
        weights: those that training changes.
        kept: a frozen copy of the dense weights, such as the teacher's, or the caller's own; with others.
    """
    return {name: kept[name] if name in kept else weight.clone() for name, weight in weights.items()}


def tensors_of(model: nn.Module | None, weights: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Returns those of some weights that are the tensors of a model itself, by name; none where either is missing."""
    states = {} if model is None or weights is None else model.state_dict()
    return {name: state for name, state in states.items() if weights and _is_same(state, weights.get(name))}


def _is_same(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.data_ptr() == other.data_ptr() != 0 and one.shape == other.shape
