"""Images mixed in pairs, and labels that are not certain: timm's mixup, cutmix and label smoothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.data import Mixup
from torch import Tensor

__all__ = ["Mixer", "describe_mixup", "make_mixup", "mix_batch"]

Mixer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Of inputs and int64[batch] labels; gives inputs and float[batch, classes] labels: ``timm.data.Mixup``, or alike."""


def make_mixup(mixup: float, cutmix: float, smoothing: float, classes: int) -> Mixer | None:
    """Give timm's ``Mixup`` for a recipe's numbers, all 0: None.

    Args:
        mixup, cutmix: alpha of the Beta distribution that the share of one image is drawn from; both: either, by turns
            drawn at random.
        smoothing: what all classes together have of a label.
        classes: how many there are.
    """
    if not (mixup or cutmix or smoothing):
        return None
    mixer: Mixer = Mixup(  # type: ignore[no-untyped-call]
        mixup, cutmix, prob=float(mixup + cutmix > 0), label_smoothing=smoothing, num_classes=classes
    )
    return mixer


def mix_batch(mixup: Mixer, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mix a batch into a new one; timm wants an even number of images, so the last of an odd one is there twice.

    Example:
        >>> mixup = make_mixup(1.0, 0.0, 0.0, classes=3)
        >>> images, labels = mix_batch(mixup, torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1]))
        >>> tuple(images.shape), tuple(labels.shape), round(float(labels.sum()), 3)
        ((5, 1, 4, 4), (5, 3), 5.0)
    """
    count = len(inputs)
    place = torch.arange(count + count % 2).clamp(max=count - 1)
    inputs, targets = mixup(inputs[place], targets[place])  # a copy: timm writes into what it is given
    return inputs[:count], targets[:count]


def describe_mixup(mixup: Mixer | None) -> str:
    """Tell one way of mixing from another.

    >>> describe_mixup(None), describe_mixup(make_mixup(0.0, 0.0, 0.0, 10))
    ('none', 'none')
    """
    return "none" if mixup is None else f"{type(mixup).__name__} {getattr(mixup, '__dict__', '')}"
