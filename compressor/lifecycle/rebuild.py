"""Name and arguments by which timm builds a model again, found from the model and checked against it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from compressor.calibration.image_shape import image_channels, image_size, submodule
from compressor.formats.errors import MissingError, UsageError
from compressor.formats.loader import build_model, build_with, refused_args
from compressor.lifecycle.trace import Trace

__all__ = ["check_rebuild", "find_args", "timm_name", "trace"]

_log = logging.getLogger(__name__)
_SIDE = 96  # of images for models of any size: the last feature map then has more than one pixel


def timm_name(model: nn.Module) -> str | None:
    """Returns the name by which timm builds a model; None if the model is not timm's."""
    cfg = getattr(model, "pretrained_cfg", None)
    return (cfg.get("architecture") or None) if isinstance(cfg, dict) else None


def find_args(model: nn.Module, given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Returns the arguments by which timm builds a model again.

    Args:
        model: the model, an ordinary module.
        given: the arguments of ``timm.create_model``; None to find them.

    Returns:
        The arguments; None where a file can hold the model's tensors only: the model is not timm's, or no arguments
        give it, which a warning says.

    Raises:
        UsageError: a packed file may not hold an argument of ``given``.
        MissingError: timm builds another model with ``given``.
    """
    name = timm_name(model)
    if name is None:
        return None if given is None else dict(given)
    if given is not None and (refused := refused_args(given)):
        raise UsageError(f"model_args: {refused}")
    try:
        return _checked(model, name, _found_args(model, name) if given is None else given)
    except MissingError as error:
        if given is None:
            _log.warning("%s; it is stored as any module, to be loaded with load(path, model=...)", error)
            return None
        raise MissingError(f"{error}{_advice(model, name)}") from None


def _checked(model: nn.Module, name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    check_rebuild(name, args, model.state_dict(), trace(model, args))
    return dict(args)


def _advice(model: nn.Module, name: str) -> str:
    """Returns the end of a message: the arguments that give the model, where they can be found."""
    try:
        return f"; left out, {_shown(_checked(model, name, _found_args(model, name)))} is found from the model"
    except MissingError:
        return "; left out, the model is stored as any module"


def trace(model: nn.Module, args: Mapping[str, Any]) -> Trace:
    """Returns what the layers of a timm model compute for one image of the size that it takes."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    usual: Any = cfg.get("input_size") or (3, 224, 224)
    channels: Any = args.get("in_chans") or getattr(model, "in_chans", usual[0])
    size = args.get("img_size")
    shapes: list[tuple[int, ...]] = []
    sides: Any = usual[1:] if size is None else size if isinstance(size, list | tuple) else (size, size)
    if size is None and not cfg.get("fixed_input_size"):
        shapes = [(1, channels, _SIDE, _SIDE)]
    return Trace.of(model, [*shapes, (1, channels, *sides)])


def check_rebuild(name: str, args: Mapping[str, Any], state: Mapping[str, Tensor], expected: Trace) -> None:
    """Checks that timm builds a model again: the same tensors by name, and each layer computes the same with them.

    Args:
        name: of the model.
        args: the arguments of ``timm.create_model``.
        state: the tensors of the model by name.
        expected: of the model.

    Raises:
        MissingError: another model is built, or none; the message names the argument where it can be found.
    """
    about = f"timm's {name} built with {_shown(args) if args else 'no arguments'} is not this model"
    try:
        rebuilt = build_with(state, name, args)
    except MissingError as error:
        raise MissingError(f"{about}: {error} (here vs rebuilt); pass model_args") from None
    rebuilt.to(next(iter(state.values())).device)
    actual = Trace.of(rebuilt, [expected.shape] if expected.shape else [])
    if actual.shape != expected.shape:
        raise MissingError(f"{about}: the rebuilt one does not take images of {expected.shape[1:]}; pass model_args")
    if difference := expected.first_difference(actual):
        layer, here, there = difference
        what = f"{layer or 'the model'} is {here.text} here and {there.text} in the rebuilt model"
        if here.text == there.text:
            what = f"{layer or 'the model'}, a {here.text}, returns something else in the rebuilt model"
        argument = here.argument if here.argument != there.argument else None
        hint = f"={_shown({**args, argument[0]: argument[1]})}" if argument else ""
        raise MissingError(f"{about}: {what}: pass model_args{hint}")


def _shown(args: Mapping[str, Any]) -> str:
    return f"dict({', '.join(f'{key}={value!r}' for key, value in args.items())})"


def _found_args(model: nn.Module, name: str) -> dict[str, Any]:
    """Returns the arguments that timm has recorded in a model, set right by what the model is now."""
    recorded = getattr(model, "_model_args", None) or {}
    args = {key: value for key, value in recorded.items() if value is not None and not refused_args({key: value})}
    built = _visible(build_model(name, args))
    changed = {key: value for key, value in _visible(model).items() if built.get(key) != value}
    return {**args, **{key: value for key, value in changed.items() if not refused_args({key: value})}}


def _visible(model: nn.Module) -> dict[str, Any]:
    """Returns the arguments that can be read off a model: those that are changed after it was built."""
    head = getattr(model, "head", None)
    pools = (getattr(head, "global_pool", None), getattr(head, "pool_type", None), getattr(model, "global_pool", None))
    names = [getattr(pool, "pool_type", pool) for pool in pools]
    args = {
        "num_classes": getattr(_classifier(model), "out_features", getattr(model, "num_classes", None)),
        "in_chans": image_channels(model),
        "img_size": image_size(model),
        "global_pool": next((name for name in names if isinstance(name, str)), None),
    }
    return {key: list(value) if isinstance(value, tuple) else value for key, value in args.items() if value is not None}


def _classifier(model: nn.Module) -> nn.Module | None:
    return submodule(model, (getattr(model, "pretrained_cfg", None) or {}).get("classifier"))
