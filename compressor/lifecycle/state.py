"""The state of a model that a packed file can hold."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from compressor.formats.errors import FormatError, UsageError
from compressor.formats.file.fields import parse_name, parse_shape
from compressor.formats.file.objects import PREPROCESSING
from compressor.formats.torch_tensors import SAFETENSORS_NAMES

__all__ = ["preprocessing", "state_to_pack"]

_log = logging.getLogger(__name__)


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


def preprocessing(model: nn.Module) -> dict[str, Any] | None:
    """Returns timm's settings for preparing the images of a model; None where it has none.

    A setting that no image can be prepared with is left out, and a warning says so.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    if not isinstance(cfg, dict):
        return None
    given = {key: cfg[key] for key in PREPROCESSING if cfg.get(key) is not None}
    listed = {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}
    for key in [key for key, value in listed.items() if not PREPROCESSING[key].fits(value)]:
        value, expected = listed.pop(key), PREPROCESSING[key].expected
        _log.warning("%s of pretrained_cfg is %.80r, expected %s: it is not stored", key, value, expected)
    return listed or None
