"""Accuracy on a data set, in one process or several."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.data.batches import check_batch
from compressor.data.distributed_sampler import shard_for_evaluation
from compressor.data.splits import UNREADABLE, check_readable
from compressor.distributed.collectives import all_reduce_sum
from compressor.formats.errors import MissingError, UsageError
from compressor.report.interval import wilson_interval
from compressor.sharing.parametrization import cached_weights
from compressor.training.modes import eval_mode
from compressor.training.out_of_memory import predict

__all__ = ["Evaluation", "evaluate"]

_LEFT_OUT = -(1 << 31)  # in place of a class and whether it was predicted, for an image that could not be read


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The correctness of predictions on a data set.

    Args:
        correct: bool[n], whether the class of each image was predicted; of each position, where images have several.
        labels: int32[n], the classes.
    """

    correct: Tensor
    labels: Tensor

    @property
    def n(self) -> int:
        """The number of images."""
        return len(self.correct)

    @property
    def top1(self) -> float:
        """The share of images whose class was predicted, 0 to 1."""
        return int(self.correct.sum()) / max(self.n, 1)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of top-1, by Wilson's score.

        >>> low, high = Evaluation(torch.ones(360, dtype=torch.bool), torch.zeros(360)).interval
        >>> round(low, 4), round(high, 4)
        (0.9894, 1.0)
        """
        return wilson_interval(self.top1, self.n)

    def count(self, classes: int, chosen: Tensor | None = None) -> list[int]:
        """Returns for each class the number of its images, or of those among them that are chosen by a bool[n]."""
        labels = self.labels if chosen is None else self.labels[chosen]
        counts: list[int] = torch.bincount(labels, minlength=classes).tolist()
        return counts


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable[Any]) -> Evaluation:
    """Evaluates a model on a data set, in eval mode, and restores the mode of every module.

    Where several processes train a model, all of them have to call this; each evaluates its share of a DataLoader's
    images, and all get the whole result. Images that cannot be read are left out.

    Args:
        loader: of batches (inputs, targets).

    Raises:
        UsageError: a batch is no pair of tensors.
        MissingError: the data set is empty, or more of its images cannot be read than are allowed.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with eval_mode(model), cached_weights():
        results = _results(model, loader, device)
    check_readable(loader)
    there = results[results != _LEFT_OUT]
    if not len(there):
        raise MissingError("the data set to evaluate on is empty")
    return Evaluation((there & 1).bool(), there >> 1)


def _results(model: nn.Module, loader: Iterable[Any], device: torch.device) -> Tensor:
    """Returns twice the class of each image, plus 1 where it was predicted, in order, or ``_LEFT_OUT``: int32[n].

    One number for both, because processes gather them; on the CPU.
    """

    def results(batch: Any) -> Tensor:
        check_batch(batch)
        inputs, targets = batch
        if not targets.ndim:
            raise UsageError("the loader to evaluate on gives single items: make batches, DataLoader(data, batch_size)")
        classes = targets.cpu()
        both: Tensor = 2 * classes + (predict(model, inputs, device) == classes)
        return both.masked_fill(classes == UNREADABLE, _LEFT_OUT).to(torch.int32)

    if (shares := shard_for_evaluation(loader)) is None:
        return torch.cat([torch.zeros(0, dtype=torch.int32), *(results(batch).reshape(-1) for batch in loader)])
    own_batches, positions, images = shares
    gathered = torch.zeros(images, dtype=torch.int32, device=device)
    for position, batch in zip(positions, own_batches, strict=True):
        gathered[position] = results(batch).to(device)
    all_reduce_sum([gathered])  # each process has filled its own positions, and left the others 0
    return gathered.cpu()
