"""The model of a run and how its images are prepared, as name, options and data call for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from compressor.cli.click_options import given_flags
from compressor.cli.configs import ModelConfig, Request
from compressor.cli.preprocessing import PreprocessingConfig
from compressor.data.datasets import Dataset
from compressor.data.preprocessing import resolve_preprocessing
from compressor.formats.errors import MissingError, UsageError
from compressor.models.checkpoint import stored_preprocessing
from compressor.models.names import NamedModel

__all__ = ["ModelSource", "check_fixed", "check_head", "model_args", "model_source", "own_preprocessing"]


@dataclass(frozen=True)
class ModelSource:
    """A model that timm can build, and where its weights come from.

    Args:
        config: as asked for; its name is one that ``timm.create_model`` takes.
        args: arguments of ``timm.create_model``.
        named: what timm knows by the name.
        preprocessing: of its images, and ``label_names``, by the names of ``pretrained_cfg``; empty: timm's own.
    """

    config: ModelConfig
    args: Mapping[str, Any]
    named: NamedModel
    preprocessing: Mapping[str, Any] = field(default_factory=dict)


def model_source(request: Request, named: NamedModel, data: Dataset | None) -> ModelSource:
    """Returns the model to compress, for the images of the data, or for those that its options describe."""
    args = model_args(request.model, request.preprocessing, named, data)
    if data is not None:
        preprocessing = {**data.preprocessing, "label_names": data.classes}
    else:
        asked = {**request.preprocessing.asked, "in_chans": request.model.in_chans}
        own = own_preprocessing(request.model, named)
        names = _class_names(request.preprocessing.class_map) or own.get("label_names") or ()
        is_timms = own == named.cfg and not any(asked.values()) and names == own.get("label_names", ())
        preprocessing = {} if is_timms else {**resolve_preprocessing(asked, own), "label_names": names}
    return ModelSource(replace(request.model, name=named.name), args, named, preprocessing)


def model_args(
    config: ModelConfig, asked: PreprocessingConfig, named: NamedModel, data: Dataset | None
) -> dict[str, Any]:
    """Returns the arguments of ``timm.create_model`` that the name, the data and the options call for."""
    args: dict[str, Any] = {"num_classes": config.num_classes, "in_chans": config.in_chans, "img_size": None}
    if data is not None:
        args["num_classes"] = config.num_classes or data.num_classes
        args["in_chans"] = data.input_size[0] if data.input_size[0] != 3 else config.in_chans
        size: tuple[int, ...] | None = data.input_size[1:]
    elif asked.input_size is not None:
        channels, *sides = asked.input_size
        args["in_chans"] = channels if channels != 3 else config.in_chans
        size = tuple(sides)
    else:
        size = None if asked.img_size is None else (asked.img_size, asked.img_size)
    usual = named.args.get("img_size") or named.cfg.get("input_size", (3, 0, 0))[1:]
    if (
        size is not None and named.cfg.get("fixed_input_size") and size != _pair(usual)
    ):  # others' constructors know none
        args["img_size"] = size[0] if size[0] == size[1] else list(size)
    return {**named.args, **{name: value for name, value in args.items() if value is not None}}


def _pair(size: Any) -> tuple[int, ...]:
    return tuple(size) if isinstance(size, list | tuple) else (size, size)


def own_preprocessing(model: ModelConfig, named: NamedModel) -> Mapping[str, Any]:
    """Returns the configuration of the weights that a run starts from: that of a packed file, or timm's."""
    path = model.checkpoint_path
    return {**named.cfg, **stored} if path is not None and (stored := stored_preprocessing(path)) else named.cfg


def _class_names(class_map: Path | None) -> tuple[str, ...]:
    if class_map is None:
        return ()
    try:
        return tuple(line.strip() for line in class_map.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as exc:
        raise MissingError(
            f"--class-map {class_map}: cannot be read ({getattr(exc, 'strerror', None) or exc})"
        ) from exc


def check_fixed(data: Dataset, asked: PreprocessingConfig, in_chans: int | None = None) -> None:
    """Raises UsageError for options about images that data held in memory, which has its own, does not follow."""
    if data.resizing:
        return
    channels, side, _ = data.input_size
    sizes = ("--input-size", asked.input_size, data.input_size), ("--img-size", asked.img_size, side)
    for flag, wanted, has in (*sizes, ("--in-chans", in_chans, channels)):
        if wanted not in (None, has):
            given, own = (one if isinstance(one, int) else "x".join(map(str, one)) for one in (wanted, has))
            raise UsageError(f"{flag} {given}: the images of {data.name} have {own}; leave it out")
    if flags := given_flags(asked, "crop_pct", "crop_mode", "mean", "std", "interpolation"):
        raise UsageError(f"{', '.join(flags)}: the images of {data.name} are prepared in their own way; leave it out")


def check_head(model: nn.Module, data: Dataset, config: ModelConfig) -> None:
    """Raises MissingError unless the model has the classes of the data."""
    if config.num_classes not in (None, data.num_classes):
        raise MissingError(f"--num-classes {config.num_classes}: {data.name} has {data.num_classes} classes")
    if getattr(model, "num_classes", data.num_classes) != data.num_classes:
        raise MissingError(f"{config.name} tells {model.num_classes} classes apart, {data.name} has {data.num_classes}")
