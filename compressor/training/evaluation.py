"""Accuracy on a data set, in one process or several."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.data.distributed_sampler import shard_for_evaluation
from compressor.data.splits import UNREADABLE, check_pictures
from compressor.distributed.collectives import all_reduce_sum
from compressor.formats.errors import MissingError
from compressor.sharing.parametrization import cached_weights
from compressor.training.out_of_memory import predict

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Predictions on a data set.

    Args:
        correct: bool[n], whether each image's class was found.
    """

    correct: Tensor

    @property
    def n(self) -> int:
        """Number of images."""
        return len(self.correct)

    @property
    def top1(self) -> float:
        """Share of images whose class was found, 0 to 1."""
        return int(self.correct.sum()) / max(self.n, 1)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the share, by Wilson's score.

        >>> low, high = Evaluation(torch.ones(360, dtype=torch.bool)).interval
        >>> round(low, 4), round(high, 4)
        (0.9894, 1.0)
        """
        z, n, p = 1.959964, max(self.n, 1), self.top1
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable[Any]) -> Evaluation:
    """Classify a data set, in eval mode; the model's mode is left as it was.

    Where several processes train a model, all of them have to call this; each takes its share of a DataLoader's images,
    and all get all answers. Pictures that cannot be read are left out; raises MissingError for more than may be.
    """
    was_training = model.training
    model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with cached_weights():
        answers = _answers(model, loader, device)
    model.train(was_training)
    check_pictures(loader)
    correct = answers[answers != _LEFT_OUT]
    if not len(correct):
        raise MissingError("the data set to evaluate on is empty")
    return Evaluation(correct.bool())


_LEFT_OUT = 2


def _answers(model: nn.Module, loader: Iterable[Any], device: torch.device) -> Tensor:
    """Tell of each image, in order, whether its class was found: uint8[n] on the CPU, 2 for what is not an image."""

    def found(inputs: Tensor, targets: Tensor) -> Tensor:
        wanted = targets.cpu()
        right = (predict(model, inputs, device) == wanted).to(torch.uint8)
        return right.masked_fill(wanted == UNREADABLE, _LEFT_OUT)

    if (shares := shard_for_evaluation(loader)) is None:
        return torch.cat([torch.zeros(0, dtype=torch.uint8), *(found(*batch) for batch in loader)])
    own, places, images = shares
    answers = torch.zeros(images, dtype=torch.uint8, device=device)
    for place, batch in zip(places, own, strict=True):
        answers[place] = found(*batch).to(device)
    all_reduce_sum([answers])
    return answers.cpu()
