"""Shape of the images that a model takes, read off a timm model."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["image_channels", "image_shape", "image_size", "submodule"]


def image_shape(model: nn.Module) -> tuple[int, int, int] | None:
    """Returns channels, height and width of the images that timm says a model takes.

    Height and width are those that the model was built for, or else those of timm's pretrained weights: a network
    without a fixed size may have been trained on images of another.

    Args:
        model: the model; its number of channels may differ from that of timm's pretrained weights.

    Returns:
        (C, H, W); None where the model does not say it: it is not timm's, or takes no images.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    usual = cfg.get("input_size") if isinstance(cfg, dict) else None
    if not isinstance(usual, tuple | list) or len(usual) != 3:
        return None
    size = image_size(model)
    sides = usual[1:] if size is None else size if isinstance(size, tuple | list) else (size, size)
    if len(sides) != 2:
        return None
    return int(image_channels(model) or usual[0]), int(sides[0]), int(sides[1])


def image_channels(model: nn.Module) -> Any:
    """Returns the number of channels that the first layer of a timm model takes; None where it is not known."""
    first = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv")
    return getattr(submodule(model, first), "in_channels", getattr(model, "in_chans", None))


def image_size(model: nn.Module) -> Any:
    """Returns the ``img_size`` a timm model was built with, a number or a pair; None if it takes images of any size."""
    traits = getattr(model, "_traits", None) or {}
    return traits.get("img_size") or getattr(getattr(model, "patch_embed", None), "img_size", None)


def submodule(model: nn.Module, name: Any) -> nn.Module | None:
    """Returns the module of a name in timm's ``pretrained_cfg``; of the first name, where there are several."""
    name = name[0] if isinstance(name, list | tuple) and name else name
    return dict(model.named_modules()).get(name) if isinstance(name, str) else None
