"""The state of a model that a packed file can hold."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compressor.formats.errors import FormatError, UsageError
from compressor.formats.file.fields import parse_name, parse_shape
from compressor.formats.torch_tensors import SAFETENSORS_NAMES

__all__ = ["state_to_pack"]


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
