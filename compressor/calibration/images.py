"""The images that curvature is measured on, from what a caller has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.calibration.image_counts import DEFAULT_IMAGES, FEWEST_IMAGES, MOST_IMAGES
from compressor.calibration.image_shape import image_shape
from compressor.calibration.synthetic import synthetic_images
from compressor.formats.errors import UsageError

__all__ = ["Calibration", "CalibrationImages", "batches_of", "calibration_images", "images_for"]

BATCH = 64  # images that the model is run on at a time
NUMBERS = 1 << 20  # of their values, so that large images come in smaller batches

Calibration = Tensor | Iterable[Any]
"""Images, [n, C, H, W], or batches of them, with or without targets, which are not used."""


def calibration_images(calibration: Calibration) -> Tensor:
    """Returns images as one float tensor, [n, ...].

    Args:
        calibration: a tensor, or batches, of which the first ``MOST_IMAGES`` images are taken.

    Raises:
        UsageError: there are fewer than 16 images, or something that is no images, or values that are not finite.
    """
    if isinstance(calibration, Tensor) and calibration.ndim:
        images = calibration
    elif isinstance(calibration, Tensor) or not isinstance(calibration, Iterable):
        raise UsageError(f"calibration must be images, or batches of them, got {calibration!r:.80}")
    else:
        parts: list[Tensor] = []
        for batch in calibration:
            parts.append(_inputs(batch))
            if sum(map(len, parts)) >= MOST_IMAGES:
                break
        images = _joined(parts)[:MOST_IMAGES]
    if len(images) < FEWEST_IMAGES:
        raise UsageError(
            f"calibration: {len(images)} images, expected at least {FEWEST_IMAGES}, better {DEFAULT_IMAGES}"
        )
    if images.is_floating_point() and not bool(torch.isfinite(images).all()):
        raise UsageError("calibration: some values of the images are NaN or infinite")
    return images


def batches_of(images: Tensor) -> tuple[Tensor, ...]:
    """Returns images, float[n, ...], in batches that the model is run on: fewer at a time where they are large."""
    batches: tuple[Tensor, ...] = images.split(max(1, min(BATCH, NUMBERS // max(1, images[0].numel()))))
    return batches


@dataclass(frozen=True)
class CalibrationImages:
    """The images to measure on, and where they come from.

    Args:
        images: float[n, ...].
        source: "data", or what they were made from.
    """

    images: Tensor
    source: str


def images_for(model: nn.Module, calibration: Calibration | str, seed: int) -> CalibrationImages:
    """Returns the images of a caller, or images made from the model where the word "synthetic" asks for them.

    Raises:
        UsageError: as ``calibration_images``; the word is another, or it is not known which images the model takes.
    """
    if not isinstance(calibration, str):
        return CalibrationImages(calibration_images(calibration), "data")
    if calibration != "synthetic":
        raise UsageError(f"calibration must be images, 'synthetic' or None, got {calibration!r}")
    shape = image_shape(model)
    if shape is None:
        raise UsageError("calibration='synthetic': it is not known which images the model takes; give it images")
    made = synthetic_images(model, shape, seed=seed)
    return CalibrationImages(made.images, made.source)


def _inputs(batch: Any) -> Tensor:
    inputs = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if not isinstance(inputs, Tensor) or not inputs.ndim:
        raise UsageError(
            f"calibration: a batch must be a tensor or begin with one, got {type(batch).__name__}: give the loader a "
            "collate_fn that returns (inputs, targets)"
        )
    return inputs


def _joined(parts: list[Tensor]) -> Tensor:
    if not parts:
        return torch.empty(0)
    shapes = sorted({tuple(part.shape[1:]) for part in parts})
    if len(shapes) > 1:
        raise UsageError(f"calibration: images of several shapes, {shapes[0]} and {shapes[1]}: give them one")
    return torch.cat(parts)
