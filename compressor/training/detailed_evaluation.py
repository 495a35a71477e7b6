"""Figures of a model on a data set beside top-1: top-5, loss, and accuracy class by class."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor.data.splits import UNREADABLE, check_readable
from compressor.formats.errors import MissingError
from compressor.training.evaluation import Evaluation
from compressor.training.modes import eval_mode
from compressor.training.out_of_memory import predict

__all__ = ["TOP", "DetailedEvaluation", "measure"]

TOP = 5
"""Classes among which the right one may be, for top-5."""


@dataclass(frozen=True, eq=False)
class DetailedEvaluation(Evaluation):
    """How a model answers for each image of a data set.

    Args:
        correct: bool[n], whether the class of each image was predicted.
        labels: int64[n], the classes.
        in_top5: bool[n], whether it was among the five classes with the highest scores.
        losses: float32[n], cross-entropy in nats.
        seconds: that it took, reading the images included.
    """

    in_top5: Tensor
    losses: Tensor
    seconds: float

    @property
    def top5(self) -> float:
        """The share of images whose class was among the five best, 0 to 1."""
        return int(self.in_top5.sum()) / self.n

    @property
    def loss(self) -> float:
        """The mean cross-entropy of an image, in nats."""
        return float(self.losses.double().mean())

    @property
    def images_per_second(self) -> float:
        """The number of images that were read and classified in a second."""
        return self.n / max(self.seconds, 1e-9)


@torch.no_grad()
def measure(model: nn.Module, loader: Iterable[Any]) -> DetailedEvaluation:
    """Measures a model on a data set, in eval mode and in one process; images that cannot be read are left out.

    Args:
        model: gives a score for each class.
        loader: of batches (inputs, targets).

    Raises:
        MissingError: the data set is empty, or more of its images cannot be read than are allowed.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    parts: list[tuple[Tensor, ...]] = []
    started = time.perf_counter()
    with eval_mode(model):
        for inputs, targets in loader:
            there = targets != UNREADABLE
            if there.any():
                scores = predict(model, inputs[there], device, lambda output: output.float())
                parts.append(_figures(scores, targets[there]))
    seconds = time.perf_counter() - started
    check_readable(loader)
    if not parts:
        raise MissingError("the data set to evaluate on is empty")
    correct, labels, in_top5, losses = (torch.cat(part) for part in zip(*parts, strict=True))
    return DetailedEvaluation(correct, labels, in_top5, losses, seconds)


def _figures(scores: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Returns for each image whether its class is the best, its class, whether it is in the top five, and the loss."""
    best = scores.topk(min(TOP, scores.shape[1]), dim=1).indices
    losses = functional.cross_entropy(scores, targets, reduction="none")
    return scores.argmax(dim=1) == targets, targets, (best == targets[:, None]).any(1), losses
