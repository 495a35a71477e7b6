"""How images are prepared for a model: what timm makes of its configuration and of what was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compressor.formats.errors import UsageError

__all__ = ["describe_preprocessing", "resolve_preprocessing"]


def resolve_preprocessing(asked: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the preprocessing of images as ``timm.data.resolve_data_config`` resolves it, for any number of channels.

    Args:
        asked: what wins over the model's own: any of ``img_size``, ``input_size``, ``in_chans``, ``mean``, ``std``,
            ``interpolation``, ``crop_pct`` and ``crop_mode``; mean and std with one value, or one a channel.
        own: the ``pretrained_cfg`` of the model, or the preprocessing that a packed file states.

    Returns:
        ``input_size`` (C, H, W), ``mean`` and ``std`` with a value a channel, ``interpolation``, ``crop_pct`` and
        ``crop_mode``.

    Raises:
        UsageError: mean or std have neither one value nor one a channel.

    Example:
        >>> resolve_preprocessing({"img_size": 32, "in_chans": 1}, {"mean": (0.25, 0.5, 0.75), "std": (0.5, 0.5, 0.5)})
        {'input_size': (1, 32, 32), 'interpolation': 'bicubic', 'mean': (0.5,), 'std': (0.5,), 'crop_pct': 0.875, \
'crop_mode': 'center'}
    """
    from timm.data import resolve_data_config

    usual = tuple(own.get("input_size") or (3, 224, 224))
    channels = (asked.get("input_size") or [asked.get("in_chans") or usual[0]])[0]
    args = {**asked, "in_chans": channels}
    if not asked.get("input_size") and not asked.get("img_size"):
        args["input_size"] = (channels, *usual[1:])
    for key in ("mean", "std"):
        given: Sequence[float] = asked.get(key) or ()
        if len(given) not in (0, 1, channels):
            raise UsageError(
                f"--{key}: {len(given)} values for images of {channels} channels, expected 1 or {channels}"
            )
    config: dict[str, Any] = resolve_data_config(args, own)  # type: ignore[no-untyped-call]
    for key in ("mean", "std"):  # a model of grey images takes the mean over the colours
        values = tuple(config[key])
        config[key] = values if len(values) == channels else (sum(values) / len(values),) * channels
    return {**config, "input_size": tuple(config["input_size"]), "crop_pct": float(config["crop_pct"])}


def describe_preprocessing(preprocessing: Mapping[str, Any]) -> str:
    """Returns the preprocessing in one line, of which a file may state a part only.

    >>> describe_preprocessing({"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.25, 0.5, 0.125),
    ...     "interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center"})
    '3x32x32, bicubic, crop 0.875 center, mean 0.5, std 0.25 0.5 0.125'
    """
    parts = ["x".join(map(str, preprocessing["input_size"]))] if "input_size" in preprocessing else []
    parts += [preprocessing["interpolation"]] if "interpolation" in preprocessing else []
    if "crop_pct" in preprocessing:
        parts.append(f"crop {preprocessing['crop_pct']:g} {preprocessing.get('crop_mode', '')}".rstrip())
    for key in (key for key in ("mean", "std") if preprocessing.get(key)):
        values = preprocessing[key]
        shown = values[:1] if len(set(values)) == 1 else values
        parts.append(f"{key} {' '.join(f'{value:g}' for value in shown)}")
    return ", ".join(parts)
