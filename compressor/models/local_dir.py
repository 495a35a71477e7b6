"""Folders that timm loads by ``local-dir:``: the configuration that tells it the model of the weights beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm

from compressor.formats.loader import build_model, updated_cfg

__all__ = ["CONFIG", "WEIGHTS", "local_config"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
"""The files of the folder; timm looks for weights of this name first."""


def local_config(model: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the ``config.json`` of a packed file's model, as ``timm.models.save_for_hf`` writes it.

    That function writes weights too, which it does not do atomically, and not for tied tensors.

    Args:
        model: name and arguments of the model, as a packed file states them.
        preprocessing: that the file states.

    Example:
        >>> config = local_config({"name": "test_resnet", "args": {"num_classes": 2}}, {"input_size": [3, 32, 32]})
        >>> config["architecture"], config["num_classes"], config["pretrained_cfg"]["input_size"]
        ('test_resnet', 2, (3, 32, 32))
    """
    sketch: Any = build_model(model["name"], model["args"])
    cfg = timm.models.filter_pretrained_cfg(updated_cfg(sketch, preprocessing), remove_source=True)  # type: ignore[no-untyped-call]
    cfg["custom_load"] = False  # the weights are in timm's own format
    for key in ("architecture", "tag"):
        cfg.pop(key, None)
    names = {"label_names": cfg.pop("label_names")} if "label_names" in cfg else {}
    return {
        "architecture": model["name"],
        "num_classes": sketch.num_classes,
        "num_features": sketch.num_features,
        **names,
        "pretrained_cfg": cfg,
        "model_args": dict(model["args"]),
    }
