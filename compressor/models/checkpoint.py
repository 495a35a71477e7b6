"""Checkpoints: the weights of a model in a file, of timm, of a training of one's own, or packed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
from torch import Tensor, nn

from compressor.formats.errors import FileError, MissingError, UnsupportedError
from compressor.formats.file.container import KEY
from compressor.formats.file.reader import PackedFile
from compressor.formats.loader import load_state_dict

__all__ = ["Checkpoint", "load_checkpoint", "read_checkpoint", "stored_preprocessing", "why_no_file"]

PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "timm_model.")
"""What modules that hold the model, wrappers of torch and of training frameworks, put before its names."""
OTHER_CLASSES = "--num-classes {classes}"
ARRAYS = (".npz", ".npy")
_SHOWN = 3  # differences that a message lists
_MAX_GLOBALS = 10  # classes of a pickle that a message lists


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The weights in a file.

    Args:
        path: of the file.
        state: the tensors by name.
        model: the name of the timm model that a packed file states.
        preprocessing: that a packed file states.
    """

    path: Path
    state: Mapping[str, Tensor]
    model: Any = None
    preprocessing: Mapping[str, Any] = field(default_factory=dict)


def read_checkpoint(path: Path, pickles: bool) -> Checkpoint:
    """Reads a packed file, or any safetensors file.

    Args:
        path: the file.
        pickles: whether torch's own files are read too, of which only tensors and plain values are unpickled.

    Raises:
        MissingError: there is no such file; without ``pickles``, also a file that is damaged or no safetensors file.
        UnsupportedError: the file is damaged, or none of these.
        FileError: a packed file that is damaged.
    """
    if not path.is_file():
        raise MissingError(f"{path}: {why_no_file(path)}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            packed = KEY in (file.metadata() or {})
        if not packed:
            return Checkpoint(path, safetensors.torch.load_file(path))
    except (safetensors.SafetensorError, OSError) as exc:
        if pickles and path.suffix != ".safetensors":
            return Checkpoint(path, _unpickled(path))
        reason = " ".join(str(exc).split())
        if pickles:
            raise UnsupportedError(f"{path}: damaged, or no checkpoint ({reason})") from exc
        raise MissingError(
            f"{path}: damaged, or no safetensors file ({reason}); a pickle such as .pth is never read: "
            "write its state dict by safetensors.torch.save_file"
        ) from exc
    with PackedFile.open(path) as opened:
        name, own = (opened.model or {}).get("name"), dict(opened.preprocessing or {})
    return Checkpoint(path, load_state_dict(path), name, own)


def why_no_file(path: Path) -> str:
    """Returns what a path is that is no file, for messages."""
    return "a folder, expected a file" if path.is_dir() else "no such file"


def stored_preprocessing(path: Path) -> dict[str, Any]:
    """Returns the preprocessing that a packed file states; none for a checkpoint of another kind, or a damaged file."""
    try:
        with PackedFile.open(path) as opened:
            return dict(opened.preprocessing or {})
    except FileError:  # which reading the weights explains
        return {}


def load_checkpoint(checkpoint: Checkpoint, model: nn.Module, name: str, other_classes: str = OTHER_CLASSES) -> None:
    """Loads a checkpoint into a timm model, whatever known prefixes its names have.

    Args:
        checkpoint: as read.
        model: is changed.
        name: of the model, for messages.
        other_classes: what to do about a checkpoint of ``{classes}`` classes where the model has ``{expected}``.

    Raises:
        MissingError: the weights are those of another model, or of other classes.
    """
    stored = checkpoint.model
    if stored is not None and str(stored).partition(".")[0] != name.partition(".")[0]:  # tags may differ
        raise MissingError(f"{checkpoint.path} holds a {ascii(stored)[:80]}, expected a {name!r}")
    state = _without_prefixes(checkpoint, model.state_dict().keys())
    _check(checkpoint.path, state, model, name, other_classes)
    model.load_state_dict(state)


def _unpickled(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a file of torch.save, those of timm's trainings or under a single other key included."""
    try:
        loaded: Any = timm.models.load_state_dict(str(path))
    except (MemoryError, OSError):
        raise
    except Exception as exc:  # bytes that are no pickle can be instructions of one, and fail in any way
        reason = _reason(" ".join(f"{exc}".split()))
        raise UnsupportedError(f"{path}: damaged, or no checkpoint ({reason})") from exc
    parts = [value for value in loaded.values() if isinstance(value, Mapping) and _has_tensors(value)]
    state = parts[0] if len(parts) == 1 and not _has_tensors(loaded) else loaded
    return {str(key): value for key, value in state.items() if isinstance(value, Tensor)}


def _has_tensors(values: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in values.values())


def _reason(text: str) -> str:
    """Returns why torch could not read a file, without its advice, which is for programs and unsafe."""
    if "weights_only" not in text:
        return text[:300]
    names = re.findall(r"[\w.]+", (re.findall(r"Unsupported globals: (.*?)\. No automatic", text) or [""])[0])
    more = f" and {len(names) - _MAX_GLOBALS} more" if len(names) > _MAX_GLOBALS else ""
    listed = f": {', '.join(names[:_MAX_GLOBALS])}{more}" if names else ""
    return f"it holds more than tensors{listed}; write them alone, torch.save(model.state_dict(), FILE)"


def _without_prefixes(checkpoint: Checkpoint, wanted: Any) -> dict[str, Tensor]:
    """Returns the tensors by the model's names: prefixes are taken off a name until the model knows it."""
    origins: dict[str, str] = {}
    for key in checkpoint.state:
        name = key
        while name not in wanted and name.startswith(PREFIXES):
            name = name.partition(".")[2]
        if name in origins:
            raise MissingError(f"{checkpoint.path} holds two models: both {origins[name]} and {key} are its {name}")
        origins[name] = key
    return {name: checkpoint.state[key] for name, key in origins.items()}


def _check(path: Path, state: Mapping[str, Tensor], model: nn.Module, name: str, other_classes: str) -> None:
    """Raises MissingError unless names and shapes are the model's; a different number of classes is reported first."""
    wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    stored = {key: tuple(tensor.shape) for key, tensor in state.items()}
    reshaped = [key for key in wanted if key in stored and wanted[key] != stored[key]]
    if wanted.keys() == stored.keys() and reshaped and all(key in _head(model) for key in reshaped):
        classes = stored[reshaped[0]][0] if stored[reshaped[0]] else 1
        hint = other_classes.format(classes=classes, expected=wanted[reshaped[0]][0])
        raise MissingError(f"{path}: {classes} classes in the checkpoint: {hint}")
    faults = [f"{key} {stored[key]}, expected {wanted[key]}" for key in sorted(reshaped)]
    faults += [f"{key} is missing" for key in wanted if key not in stored]
    faults += [f"{ascii(key)[1:-1][:80]} is unknown" for key in stored if key not in wanted]
    if faults:
        more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise MissingError(f"{path} holds no {name}: {'; '.join(faults[:_SHOWN])}{more}")


def _head(model: nn.Module) -> set[str]:
    """Returns the names of the classifier's tensors, if timm's configuration names the classifier."""
    heads = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return {f"{head}.{kind}" for head in ([heads] if isinstance(heads, str) else heads) for kind in ("weight", "bias")}
