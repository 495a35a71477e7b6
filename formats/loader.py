"""Packed files as timm models, or loaded into any other module."""

from __future__ import annotations

import inspect
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.overrides import TorchFunctionMode

from compressor.formats.content import Content
from compressor.formats.errors import FormatError, MissingError, UsageError, did_you_mean, printable
from compressor.formats.file.reader import PackedFile
from compressor.formats.inference.packed_weight import install, read_packed
from compressor.formats.model_args import fault_of_args
from compressor.formats.torch_tensors import load_state_dict, read_tensors, stored_shapes

__all__ = [
    "build_model",
    "build_with",
    "check_fits",
    "differences",
    "load",
    "load_state_dict",
    "refused_args",
    "updated_cfg",
]

_MAX_LISTED = 5  # differences that a message lists
_MAX_REASON = 300  # characters of a message that may be another's
_MAX_MODULES = 50_000  # of a model; the largest of timm has about 6,000
_WEIGHTS = ("dense", "packed")
_OF_TIMMS_WEIGHTS = {"test_input_size", "test_crop_pct", "label_names", "label_descriptions", "label_offset"}
"""What a ``pretrained_cfg`` says of timm's weights that is untrue of others."""
_RANDOM_FILLS = {
    "uniform_", "normal_", "trunc_normal_", "erfinv_", "kaiming_uniform_", "kaiming_normal_",
    "xavier_uniform_", "xavier_normal_", "orthogonal_",
}  # fmt: skip


def load(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    weights: str = "dense",
    max_memory: int | None = None,
) -> nn.Module:
    """Returns the model of a packed file, in eval mode.

    Args:
        path: the file; a text ``hf-hub:OWNER/NAME`` or ``hf-hub:OWNER/NAME@REVISION`` for one on the Hugging Face hub.
        model: the module to load into; None, the default, builds the timm model that the file names, without
            downloading anything.
        weights: "dense" (default), or "packed" for inference with little memory: linear, convolution, embedding and
            attention layers keep packed indices and expand them in each forward pass. Logits are the same bit for bit;
            no parameter requires a gradient, and the state dict holds the packed buffers. Where a codec generates the
            indices none are kept: linear and convolution layers compute a chunk of channels at a time, and may sum in
            another order.
        max_memory: the most bytes that the tensors may take when decoded, for a file you trust. None, the default, for
            the size of ``model``, which is yours; without one for what is believable for the size of the file: 256 MiB
            or 1,000 times that size, whichever is more, and at most half of the machine's memory.

    Raises:
        UsageError: ``weights`` is neither "dense" nor "packed", or ``max_memory`` is no whole number of 1 or more.
        MissingError: the file does not exist, there or here, timm has no such model, or its tensors are not those of
            the file.
        FileError: the file is damaged, hostile or of another kind, or its tensors, or the buffers that its model
            computes, take more than ``max_memory``. Nothing has been decoded then.
    """
    if weights not in _WEIGHTS:
        raise UsageError(f"weights={weights!r}, expected 'dense' or 'packed'.{did_you_mean(str(weights), _WEIGHTS)}")
    packed = weights == "packed"
    if max_memory is None and model is not None:
        max_memory = sys.maxsize  # the tensors must have the shapes of the caller's own
    with PackedFile.open(path, max_memory) as file:
        target = _build_named(file) if model is None else model
        check_fits(file, target)
        _check_memory(file, target)
        assign = _on_meta(target)
        if model is None:
            target = _with_buffers(target, *_named(file))
        _fill(target, file, assign, packed)
        if file.preprocessing:
            target.pretrained_cfg = updated_cfg(target, file.preprocessing)  # type: ignore[assignment]
    return target.eval()


def updated_cfg(model: nn.Module, preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the ``pretrained_cfg`` of a model whose images are prepared as a packed file or a data set says.

    Args:
        model: as timm builds it: its own ``pretrained_cfg`` is that of timm's weights, of other sizes and classes.
        preprocessing: fields of ``pretrained_cfg``; ``label_names`` are left out unless there is one for each class.
    """
    own: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    cfg = {**{key: value for key, value in own.items() if key not in _OF_TIMMS_WEIGHTS}, **_tuples(preprocessing)}
    classes = getattr(model, "num_classes", None)
    if type(classes) is int:
        cfg["num_classes"] = classes
    if len(cfg.get("label_names", ())) != cfg.get("num_classes"):
        cfg.pop("label_names", None)
    return cfg


def build_model(name: str, args: Mapping[str, Any], device: str = "meta") -> nn.Module:
    """Returns a timm model with uninitialised weights, to be loaded into; downloads nothing.

    Args:
        name: a model name of timm.
        args: arguments of ``timm.create_model`` that a packed file may hold: see ``refused_args``.
        device: the device of its tensors; on "meta", the default, they have shapes but no memory.

    Raises:
        MissingError: the installed timm has no such model or cannot build it, or an argument is not allowed.
    """
    if not timm.is_model(name):
        hint = did_you_mean(name, timm.list_models())
        raise MissingError(f"timm {timm.__version__} has no model {name!r}.{hint} For another module: load(model=...)")
    if refused := refused_args(args):
        raise MissingError(f"model {name!r}: {refused}")
    try:
        with torch.device(device), _WithoutRandomFills(), _bounded_modules():
            return timm.create_model(name, pretrained=False, **_tuples(args))
    except MemoryError:
        raise
    except Exception as error:  # constructors divide by arguments, use them as positions, and much else
        reason = printable(" ".join(f"{type(error).__name__}: {error}".split()))[:_MAX_REASON]
        what = f"{name!r} with {ascii(dict(args))[:_MAX_REASON]}"
        raise MissingError(f"timm {timm.__version__} cannot build {what}: {reason}") from error


def refused_args(args: Mapping[str, Any]) -> str:
    """Returns which argument of ``timm.create_model`` a packed file may not hold, and why; "" where it may hold all.

    All are allowed that are JSON and by which timm neither reads a file nor downloads anything; strings are words.
    """
    for key in args:
        if key in _FACTORY_ARGS:
            return f"{key} = {ascii(args[key])[:80]} is not allowed: it is for timm's factory, not for the model"
    return fault_of_args(args)


def build_with(state: Mapping[str, Tensor], name: str, args: Mapping[str, Any]) -> nn.Module:
    """Returns the timm model that ``load`` would build, in eval mode, with the very tensors of a state dict.

    Raises:
        MissingError: timm cannot build it, or names and shapes of the tensors are not those of the model.
    """
    model = build_model(name, args)
    if differing := differences({key: tuple(tensor.shape) for key, tensor in state.items()}, model):
        raise MissingError(differing)
    model = _with_buffers(model, name, args)
    model.load_state_dict(state, assign=True)
    return model.eval()


def check_fits(content: Content | PackedFile, model: nn.Module) -> None:
    """Checks that names and shapes of a file's tensors are those of a model's state dict.

    Raises:
        MissingError: they differ; the message lists the first differences.
    """
    if differing := differences(_shapes(content), model):
        raise MissingError(
            f"file and {type(model).__name__} differ (file vs model): {differing}; "
            f"check num_classes, in_chans and the timm version (here {timm.__version__}{_timm_of(content)})"
        )


def differences(stored: Mapping[str, tuple[int, ...]], model: nn.Module) -> str:
    """Returns the first differences of names and shapes from those of a model's state dict; "" where there is none.

    Args:
        stored: the shapes by name.
        model: the model.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = [f"{name} {wanted[name]} is missing" for name in wanted if name not in stored]
    extra = [f"{name} {stored[name]} is unknown to the model" for name in stored if name not in wanted]
    common = [name for name in wanted if name in stored]
    reshaped = [f"{name} {stored[name]} vs {wanted[name]}" for name in common if stored[name] != wanted[name]]
    faults = reshaped + missing + extra
    more = f" and {len(faults) - _MAX_LISTED} more" if len(faults) > _MAX_LISTED else ""
    return "; ".join(faults[:_MAX_LISTED]) + more


def _timm_of(content: Content | PackedFile) -> str:
    """Returns the end of a message that names the timm version of the file; "" where the file has none."""
    versions = (content.provenance or {}).get("versions")
    version = versions.get("timm") if isinstance(versions, Mapping) else None
    return f", of the file {ascii(version)[:40]}" if version is not None else ""


def _shapes(content: Content | PackedFile) -> dict[str, tuple[int, ...]]:
    shapes = stored_shapes(content)
    return {**shapes, **{alias: shapes[name] for alias, name in content.aliases.items()}}


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields with JSON's lists as the tuples that timm expects."""
    return {key: _tuple(value) for key, value in fields.items()}


def _tuple(value: Any) -> Any:
    if isinstance(value, dict):
        return _tuples(value)
    return tuple(_tuple(one) for one in value) if isinstance(value, list | tuple) else value


class _WithoutRandomFills(TorchFunctionMode):
    """Skips the random initialisation of weights that are replaced anyway, which takes most of a constructor's time."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(function, "__name__", "") in _RANDOM_FILLS:
            return args[0] if args else (kwargs or {})["tensor"]
        return function(*args, **(kwargs or {}))


_FACTORY_ARGS = {
    key
    for function in (timm.create_model, timm.models.build_model_with_cfg)
    for key, parameter in inspect.signature(function).parameters.items()
    if parameter.kind is not parameter.VAR_KEYWORD
}
"""What the factories of the installed timm take for themselves, such as where weights are read from."""


@contextmanager
def _bounded_modules() -> Iterator[None]:
    """Stops a build of more modules than any model has, which an argument of a hostile file may ask for.

    Raises:
        ValueError: inside, when there are too many.
    """
    count, thread = 0, threading.get_ident()

    def register(*_: Any) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > _MAX_MODULES:
            raise ValueError(f"more than {_MAX_MODULES:,} modules")

    hook = register_module_module_registration_hook(register)
    try:
        yield
    finally:
        hook.remove()


def _build_named(file: PackedFile) -> nn.Module:
    """Returns the timm model that the file names, built on ``meta``."""
    return build_model(*_named(file))


def _named(file: PackedFile) -> tuple[str, dict[str, Any]]:
    """Returns name and arguments of the timm model that the file names."""
    if file.model is None:
        raise MissingError(f"{file.label} names no timm model: give the module to fill, load(path, model=...)")
    return file.model["name"], dict(file.model["args"])


def _check_memory(file: PackedFile, model: nn.Module) -> None:
    """Raises FormatError where a model takes more memory than the file may; its constructor may compute buffers."""
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if size > file.max_memory:
        raise FormatError(
            f"{file.label}: its model takes {size:,} bytes, more than the {file.max_memory:,} allowed (max_memory); "
            f"if you trust the file: max_memory={size}"
        )


def _fill(model: nn.Module, file: PackedFile, assign: bool, packed: bool) -> None:
    """Loads the tensors of a file into a model.

    With ``assign`` tensors replace those of the model, else they are copied into them; with ``packed`` the shared
    tensors that layers can hold packed are installed as such instead.
    """
    shared = read_packed(file, model) if packed else {}
    state = read_tensors(file, (name for name in (*file.slices, *file.aliases) if name not in shared))
    if packed:
        install(shared, model)
    model.load_state_dict(state, strict=not packed, assign=assign)
    if assign:  # which unties tied parameters
        for alias, name in file.aliases.items():
            if name not in shared:
                _tie(model, alias, name)


def _tie(model: nn.Module, alias: str, name: str) -> None:
    """Makes the parameter ``alias`` of a model the same object as the parameter ``name``."""
    owner, _, attribute = alias.rpartition(".")
    source_owner, _, source = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, getattr(model.get_submodule(source_owner), source))


def _on_meta(model: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def _with_buffers(model: nn.Module, name: str, args: Mapping[str, Any]) -> nn.Module:
    """Returns a model on ``meta``, built again with memory where its constructor computes what no state dict has."""
    return build_model(name, args, "cpu") if _computes_buffers(model) else model


def _computes_buffers(model: nn.Module) -> bool:
    """Returns whether a model has buffers that its constructor computes and its state dict omits."""
    return not dict(model.named_buffers(remove_duplicate=False)).keys() <= model.state_dict().keys()
