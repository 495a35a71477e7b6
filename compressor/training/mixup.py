"""Mixed pairs of images, and smoothed labels: timm's mixup, cutmix and label smoothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.data import Mixup
from torch import Tensor, nn

from compressor.formats.errors import UsageError
from compressor.training.config import TrainingConfig

__all__ = ["Mixer", "describe_mixup", "make_mixup", "mix_batch", "mixup_for", "split_mixer"]

Mixer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Of inputs and int64[batch] labels; returns inputs and float[batch, classes] labels, as ``timm.data.Mixup`` does."""


def make_mixup(mixup: float, cutmix: float, smoothing: float, classes: int) -> Mixer | None:
    """Returns timm's ``Mixup`` for a recipe's numbers; None where all three are 0.

    Args:
        mixup, cutmix: alpha of the Beta distribution from which the share of one image is drawn; where both are set,
            each batch is mixed by one of the two, drawn at random.
        smoothing: share of a label that is spread over all classes, 0 to 1.
        classes: number of classes.
    """
    if not (mixup or cutmix or smoothing):
        return None
    mixer: Mixer = Mixup(  # type: ignore[no-untyped-call]
        mixup, cutmix, prob=float(mixup + cutmix > 0), label_smoothing=smoothing, num_classes=classes
    )
    return mixer


def split_mixer(overrides: Mapping[str, Any]) -> tuple[dict[str, Any], Mixer | None]:
    """Separates a mixer of the caller's own from the other options of a training.

    Args:
        overrides: options by name; ``mixup`` may be a number, a ``Mixer``, or None for no mixing.

    Raises:
        UsageError: a mixer is given together with cutmix or smoothing, which are its own business.
    """
    options = dict(overrides)
    mixup = options.get("mixup", 0.0)
    if not callable(mixup):
        return options | ({"mixup": 0.0} if mixup is None else {}), None
    if extra := [name for name in ("cutmix", "smoothing") if name in options]:
        raise UsageError(f"mixup is a mixer of your own, which does all of the mixing: leave out {' and '.join(extra)}")
    del options["mixup"]
    return options, mixup


def mixup_for(model: nn.Module, config: TrainingConfig) -> Mixer | None:
    """Returns the mixer that a config asks for, for the classes of a model; None where it asks for none.

    Args:
        model: as timm's models do, it tells its number of classes as ``num_classes``.

    Raises:
        UsageError: the model does not tell its number of classes.
    """
    if not (config.mixup or config.cutmix or config.smoothing):
        return None
    classes = getattr(model, "num_classes", None)
    if not isinstance(classes, int):
        raise UsageError(
            f"mixup, cutmix and smoothing need the number of classes, and {type(model).__name__} has no num_classes: "
            "give mixup=timm.data.Mixup(..., num_classes=N)"
        )
    return make_mixup(config.mixup, config.cutmix, config.smoothing, classes)


def mix_batch(mixup: Mixer, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a mixed copy of a batch.

    timm mixes only an even number of images, so that the last image of an odd batch is mixed twice and returned once.

    Args:
        inputs: float[batch, ...].
        targets: int64[batch], classes.

    Example:
        >>> mixup = make_mixup(1.0, 0.0, 0.0, classes=3)
        >>> images, labels = mix_batch(mixup, torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1]))
        >>> tuple(images.shape), tuple(labels.shape), round(float(labels.sum()), 3)
        ((5, 1, 4, 4), (5, 3), 5.0)
    """
    count = len(inputs)
    indices = torch.arange(count + count % 2).clamp(max=count - 1)
    inputs, targets = mixup(inputs[indices], targets[indices])  # indexing copies: timm writes into its arguments
    return inputs[:count], targets[:count]


def describe_mixup(mixup: Mixer | None) -> str:
    """Returns a text that differs for mixers with different settings, for the fingerprint of a training.

    >>> describe_mixup(None), describe_mixup(make_mixup(0.0, 0.0, 0.0, 10))
    ('none', 'none')
    """
    return "none" if mixup is None else f"{type(mixup).__name__} {getattr(mixup, '__dict__', '')}"
