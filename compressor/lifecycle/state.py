"""The state of a model that a packed file can hold."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from compressor.formats.errors import FormatError, UsageError
from compressor.formats.file.fields import parse_name, parse_shape
from compressor.formats.torch_tensors import SAFETENSORS_NAMES

__all__ = ["preprocessing", "state_to_pack"]

_PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


def state_to_pack(model: nn.Module, meta: bool = False) -> dict[str, Tensor]:
    """Returns the state dict of a model, after checking that a packed file can hold all of it.

    Args:
        model: an ordinary module.
        meta: whether tensors on ``meta``, which get their values later, are allowed.

    Raises:
        UsageError: a state is no tensor, or one of another dtype, layout or shape than the format has, or its name has
            spaces; the preprocessing in ``pretrained_cfg`` is not JSON.
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
    try:
        json.dumps(preprocessing(model), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"pretrained_cfg: the preprocessing {preprocessing(model)} is not JSON ({error})") from None
    return dict(states)


def preprocessing(model: nn.Module) -> dict[str, Any] | None:
    """Returns timm's settings for preparing the images of a model; None where it has none."""
    cfg = getattr(model, "pretrained_cfg", None)
    if not isinstance(cfg, dict):
        return None
    chosen = {key: cfg[key] for key in _PREPROCESSING if cfg.get(key) is not None}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in chosen.items()} or None
