"""Teachers for distillation: loading a bigger model from its own checkpoint, with its own preprocessing."""

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
    """A model trained on images of one normalisation, wrapped to accept images of another.

    Args:
        model: takes float[n, C, H, W].
        ours: mean and standard deviation of the images that will be given, one value per channel each.
        theirs: mean and standard deviation that ``model`` was trained with, one value per channel each.

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
        """Returns the model's output for images of our normalisation, float[n, C, H, W]."""
        output: Tensor = self.model(images * self.scale + self.shift)
        return output


def with_normalization(
    model: nn.Module, mean: Sequence[float], std: Sequence[float], own: Mapping[str, Any]
) -> nn.Module:
    """Wraps a model that was trained with its own normalisation to accept images normalised by ``mean`` and ``std``.

    Args:
        model: takes float[n, C, H, W].
        mean: of the images that will be given, one value per channel.
        std: of the images that will be given, one value per channel.
        own: the model's own ``mean`` and ``std``. If they are absent, or for another number of channels, as timm leaves
            them when a model is built with ``in_chans``, the model was trained with ``mean`` and ``std``.

    Returns:
        The wrapped model; the model itself if both normalisations are the same, or its own is for other channels.

    Raises:
        MissingError: the model's own normalisation is not one of finite numbers with a standard deviation above 0.
    """
    theirs = own.get("mean", mean), own.get("std", std)
    for values, bound in zip(theirs, (-math.inf, 0), strict=True):
        numeric = isinstance(values, list | tuple) and all(isinstance(value, float | int) for value in values)
        if not numeric or not all(bound < value < math.inf for value in values):
            raise MissingError(f"it is for images normalised by {ascii(values)[:80]}, expected numbers, std above 0")
    other_channels = any(len(values) != len(mean) for values in theirs)
    same = [list(values) for values in theirs] == [list(mean), list(std)]
    return model if other_channels or same else Renormalised(model, (mean, std), theirs)


def load_teacher(
    path: Path, name: str, args: Mapping[str, Any], mean: Sequence[float], std: Sequence[float]
) -> nn.Module:
    """Returns a timm model in eval mode with the weights of a safetensors checkpoint or a packed file.

    Args:
        path: the checkpoint; never a pickle.
        name: the model's name, of ``timm.create_model``.
        args: the arguments of ``timm.create_model`` that a packed file may hold.
        mean: of the images that will be given, one value per channel. A packed file states its own.
        std: of the images that will be given, one value per channel.

    Raises:
        MissingError: there is no such file, it is no safetensors file, or it holds the weights of another model.
        FileError: a packed file that is damaged.
    """
    model = build_model(name, args, device="cpu")
    state, stored_name, own = _read(path)
    if stored_name is not None and str(stored_name).partition(".")[0] != name.partition(".")[0]:  # tags may differ
        raise MissingError(f"{path} holds a {ascii(stored_name)[:80]}, expected a {name!r}")
    _check(path, state, model, name)
    model.load_state_dict(state)
    try:
        return with_normalization(model.eval(), mean, std, own)
    except MissingError as exc:
        raise MissingError(f"{path}: {exc}") from exc


def _read(path: Path) -> tuple[dict[str, Tensor], Any, Mapping[str, Any]]:
    """Reads the weights; of a packed file also the name of its model and its preprocessing."""
    if not path.is_file():
        raise MissingError(f"{path}: no such file")
    try:
        with safetensors.safe_open(path, "pt") as file:
            packed = KEY in (file.metadata() or {})
        if not packed:
            return safetensors.torch.load_file(path), None, {}
    except (safetensors.SafetensorError, OSError) as exc:
        reason = " ".join(str(exc).split())
        raise MissingError(
            f"{path}: damaged, or no safetensors file ({reason}); a pickle such as .pth is never read: "
            "write its state dict by safetensors.torch.save_file"
        ) from exc
    with PackedFile.open(path) as opened:
        name, own = (opened.model or {}).get("name"), dict(opened.preprocessing or {})
    return load_state_dict(path), name, own


def _check(path: Path, state: Mapping[str, Tensor], model: nn.Module, name: str) -> None:
    """Raises MissingError unless names and shapes are the model's; a different number of classes is reported first."""
    wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    stored = {key: tuple(tensor.shape) for key, tensor in state.items()}
    reshaped = [key for key in wanted.keys() & stored.keys() if wanted[key] != stored[key]]
    if wanted.keys() == stored.keys() and reshaped and all(key in _head(model) for key in reshaped):
        classes = stored[reshaped[0]][0] if stored[reshaped[0]] else 1
        raise MissingError(
            f"{path}: its head tells {classes:,} classes apart, expected {wanted[reshaped[0]][0]:,}; "
            "a teacher needs the classes of its student"
        )
    faults = [f"{key} {stored[key]}, expected {wanted[key]}" for key in sorted(reshaped)]
    faults += [f"{key} is missing" for key in wanted if key not in stored]
    faults += [f"{key} is unknown" for key in stored if key not in wanted]
    if faults:
        more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise MissingError(f"{path} holds no {name}: {'; '.join(faults[:_SHOWN])}{more}")
    if bad := [key for key, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]:
        raise MissingError(f"{path}: {bad[0]} has weights that are NaN or infinite")


def _head(model: nn.Module) -> set[str]:
    """Returns the names of the classifier's tensors, if timm's configuration names the classifier."""
    heads = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return {f"{head}.{kind}" for head in ([heads] if isinstance(heads, str) else heads) for kind in ("weight", "bias")}
