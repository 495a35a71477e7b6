"""A bigger model to distil from: its own checkpoint, checked and read, and its own preprocessing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from compressor.formats.errors import MissingError
from compressor.formats.file.container import KEY
from compressor.formats.file.reader import PackedFile
from compressor.formats.loader import build_model, load_state_dict

__all__ = ["Renormalised", "load_teacher", "with_normalization"]

_SHOWN = 3


class Renormalised(nn.Module):
    """A model for images normalised by ``theirs``, given images normalised by ``ours``.

    Args:
        model: of float[n, C, H, W].
        ours, theirs: mean and standard deviation, one value per channel each.

    Example:
        >>> model = Renormalised(nn.Identity(), ours=([0.5], [0.5]), theirs=([0.0], [1.0]))
        >>> model(torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)).flatten()
        tensor([0., 1.])
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        model: nn.Module,
        ours: tuple[Sequence[float], Sequence[float]],
        theirs: tuple[Sequence[float], Sequence[float]],
    ) -> None:
        super().__init__()
        self.model = model
        (mean, std), (its_mean, its_std) = (map(torch.tensor, pair) for pair in (ours, theirs))
        self.register_buffer("scale", (std / its_std).view(-1, 1, 1))
        self.register_buffer("shift", ((mean - its_mean) / its_std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Give the model's output."""
        output: Tensor = self.model(images * self.scale + self.shift)
        return output


def with_normalization(
    model: nn.Module, mean: Sequence[float], std: Sequence[float], own: Mapping[str, Any]
) -> nn.Module:
    """Let a model that was trained under a normalisation of its own see images normalised by ``mean`` and ``std``.

    Args:
        own: its ``mean`` and ``std``. Where they are absent, or for other channels, as timm leaves them when a model is
            built for ``in_chans``, it was trained under those given.

    Raises MissingError where its own are no numbers that can be.
    """
    theirs = own.get("mean", mean), own.get("std", std)
    for values, least in zip(theirs, (-math.inf, 0), strict=True):
        numbers = isinstance(values, list | tuple) and all(isinstance(value, float | int) for value in values)
        if not numbers or not all(least < value < math.inf for value in values):
            raise MissingError(f"it is for images normalised by {ascii(values)[:80]}, expected numbers, std above 0")
    apart = any(len(values) != len(mean) for values in theirs)
    same = [list(values) for values in theirs] == [list(mean), list(std)]
    return model if apart or same else Renormalised(model, (mean, std), theirs)


def load_teacher(
    path: Path, name: str, args: Mapping[str, Any], mean: Sequence[float], std: Sequence[float]
) -> nn.Module:
    """Give a timm model with the weights of a safetensors checkpoint or a packed file, in eval mode.

    Args:
        path: the checkpoint; never a pickle.
        name, args: of ``timm.create_model``; of the arguments those that ``compressor.formats.loader`` allows.
        mean, std: of the images it will be given. A packed file knows which its model was trained on.

    Raises:
        MissingError: no such file, no safetensors file, or the weights of another model.
        FileError: a packed file that is damaged.
    """
    model = build_model(name, args, device="cpu")
    state, made, own = _read(path)
    if made is not None and str(made).partition(".")[0] != name.partition(".")[0]:  # a tag is no architecture
        raise MissingError(f"{path} holds a {ascii(made)[:80]}, expected a {name!r}")
    _check(path, state, model, name)
    model.load_state_dict(state)
    try:
        return with_normalization(model.eval(), mean, std, own)
    except MissingError as exc:
        raise MissingError(f"{path}: {exc}") from exc


def _read(path: Path) -> tuple[dict[str, Tensor], Any, Mapping[str, Any]]:
    """Read the weights; of a packed file also the name of its model, and its preprocessing."""
    if not path.is_file():
        raise MissingError(f"{path}: no such file")
    try:
        with safetensors.safe_open(path, "pt") as file:
            packed = KEY in (file.metadata() or {})
        if not packed:
            return safetensors.torch.load_file(path), None, {}
    except (safetensors.SafetensorError, OSError) as exc:
        said = " ".join(str(exc).split())
        raise MissingError(
            f"{path}: damaged, or no safetensors file ({said}); a pickle such as .pth is never read: "
            "write its state dict by safetensors.torch.save_file"
        ) from exc
    with PackedFile.open(path) as opened:
        made, own = (opened.model or {}).get("name"), dict(opened.preprocessing or {})
    return load_state_dict(path), made, own


def _check(path: Path, state: Mapping[str, Tensor], model: nn.Module, name: str) -> None:
    """Raise MissingError unless names and shapes are the model's; say so first where the classes alone differ."""
    wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    stored = {key: tuple(tensor.shape) for key, tensor in state.items()}
    unlike = [key for key in wanted.keys() & stored.keys() if wanted[key] != stored[key]]
    if wanted.keys() == stored.keys() and unlike and all(key in _head(model) for key in unlike):
        classes = stored[unlike[0]][0] if stored[unlike[0]] else 1
        raise MissingError(
            f"{path}: its head tells {classes:,} classes apart, expected {wanted[unlike[0]][0]:,}; "
            "a teacher needs the classes of its student"
        )
    faults = [f"{key} {stored[key]}, expected {wanted[key]}" for key in sorted(unlike)]
    faults += [f"{key} is missing" for key in wanted if key not in stored]
    faults += [f"{key} is unknown" for key in stored if key not in wanted]
    if faults:
        more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise MissingError(f"{path} holds no {name}: {'; '.join(faults[:_SHOWN])}{more}")
    if bad := [key for key, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]:
        raise MissingError(f"{path}: {bad[0]} has weights that are NaN or infinite")


def _head(model: nn.Module) -> set[str]:
    """Name the tensors of the classifier, where timm says which it is."""
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return {f"{head}.{kind}" for head in ([named] if isinstance(named, str) else named) for kind in ("weight", "bias")}
