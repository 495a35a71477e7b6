"""A network and data so small that whole runs of the command take a moment; timm knows it as ``tiny``.

It has BatchNorm, and dropout, which draws between the draws of the data's augmentation.
"""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

from compressor.data.datasets import Dataset, load_data
from compressor.data.splits import ArraySplit

__all__ = ["few_digits", "tiny"]


@timm.models.register_model
def tiny(pretrained: bool = False, num_classes: int = 10, in_chans: int = 1, **_: Any) -> nn.Module:
    del pretrained
    net: Any = nn.Sequential(
        nn.Conv2d(in_chans, 16, 5, stride=4), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(16, 16, 3),
        nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, num_classes),
    )  # fmt: skip
    net.pretrained_cfg, net.num_classes = {"architecture": "tiny"}, num_classes
    return net  # type: ignore[no-any-return]


def few_digits() -> Dataset:
    """Returns the digits with 96 training images: six steps of 16 an epoch."""
    data = load_data("digits")
    for split, count in ((data.train, 96), (data.validation, 32), (data.test, 32)):
        assert isinstance(split, ArraySplit)
        split.images, split.labels = split.images[:count], split.labels[:count]
    return data
