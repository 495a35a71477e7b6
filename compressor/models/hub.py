"""The Hugging Face hub, where timm's weights are: what happens where it cannot be reached."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn

from compressor.formats.errors import MissingError
from compressor.formats.io.hub import is_reachable

__all__ = ["create_pretrained"]

WEIGHTS = "model.safetensors", "pytorch_model.bin"  # the files timm looks for where a model names none, in order


def create_pretrained(name: str, args: Mapping[str, Any]) -> nn.Module:
    """Builds a timm model with its pretrained weights, from the hub's cache alone where the hub cannot be reached.

    The hub's client asks six times for each file, for a minute, before it turns to a file in its cache. timm has no
    argument to keep it from that, but takes a file of weights: the one that is in the cache.

    Args:
        name: of the model in timm.
        args: further arguments of ``timm.create_model``.

    Raises:
        MissingError: the weights are not in the cache either.
    """
    settings = dict(args)
    try:
        at_timm = timm.models.parse_model_name(name)[0] is None
        if at_timm and not constants.HF_HUB_OFFLINE and not is_reachable() and (path := _cached_weights(name)):
            settings["pretrained_cfg_overlay"] = {
                **(settings.get("pretrained_cfg_overlay") or {}),
                "file": path,
                "custom_load": False,
            }
        model: nn.Module = timm.create_model(name, pretrained=True, **settings)
    except LocalEntryNotFoundError as exc:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        raise MissingError(
            f"the pretrained weights of {name} are not in the hub's cache {constants.HF_HUB_CACHE}, and {why}: "
            "set HF_HOME to a folder that has them, or name a file of weights with --checkpoint-path"
        ) from exc
    return model


def _cached_weights(name: str) -> str | None:
    """Returns the path of a model's weights in the hub's cache; None for a model that timm has not on the hub.

    Raises:
        LocalEntryNotFoundError: they are not in the cache.
    """
    cfg = timm.models.get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id:
        return None
    repository, _, revision = cfg.hf_hub_id.partition("@")
    *others, last = [cfg.hf_hub_filename] if cfg.hf_hub_filename else WEIGHTS
    for file in others:
        try:
            return hf_hub_download(repository, file, revision=revision or None, local_files_only=True)
        except LocalEntryNotFoundError:
            continue
    return hf_hub_download(repository, last, revision=revision or None, local_files_only=True)
