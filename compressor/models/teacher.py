"""Teachers for distillation: loading a bigger model from its own checkpoint, with its own preprocessing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.formats.errors import MissingError
from compressor.formats.loader import build_model
from compressor.models.checkpoint import load_checkpoint, read_checkpoint

__all__ = ["Renormalised", "load_teacher", "with_normalization"]


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
        FileError: a packed file that is damaged, or takes more memory than is believable for its size.
    """
    checkpoint = read_checkpoint(path, pickles=False)  # before the model is built: the file may be refused
    model = build_model(name, args, device="cpu")
    load_checkpoint(checkpoint, model, name, "a teacher needs the {expected} of its student")
    state = model.state_dict()
    if bad := [key for key, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]:
        raise MissingError(f"{path}: {bad[0]} has weights that are NaN or infinite")
    try:
        return with_normalization(model.eval(), mean, std, checkpoint.preprocessing)
    except MissingError as exc:
        raise MissingError(f"{path}: {exc}") from exc
