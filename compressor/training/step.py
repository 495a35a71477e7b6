"""One step of an optimiser, on one batch or several, in as many parts as memory requires."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressor.data.batches import check_batch
from compressor.formats.errors import ResourceError, UsageError
from compressor.sharing.parametrization import cached_weights
from compressor.training.mixed_precision import MixedPrecision
from compressor.training.mixup import Mixer, mix_batch
from compressor.training.out_of_memory import describe, free_memory, is_out_of_memory

__all__ = ["Loss", "TrainStep", "batches_by_step", "steps_per_epoch"]

_log = logging.getLogger(__name__)
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Batch = Sequence[Tensor]


class TrainStep:
    """Takes an optimiser's steps, each on the mean loss over all the images it is given.

    Where memory runs out, half as many images go through the model at a time, from then on: their gradients, each
    weighted by its share of the images, add up to the same step. BatchNorm alone notices: it sees fewer at a time.

    Args:
        precision: what is computed in, and where.
        model: on the precision's device.
        optimizer: of the model.
        loss: of (output, targets, inputs), a mean over the images.
        mixup: what mixes each batch; None: nothing does.

    Attributes:
        size: the most images at a time; 0: as many as a batch has.
    """

    def __init__(
        self, precision: MixedPrecision, model: nn.Module, optimizer: Optimizer, loss: Loss, mixup: Mixer | None = None
    ) -> None:
        self.precision, self.model, self.optimizer, self.loss = precision, model, optimizer, loss
        self.mixup = mixup
        self.size = 0
        normed = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
        self._fewest = 2 if normed else 1  # BatchNorm cannot train on one image

    def gradients(self, batches: Sequence[Batch]) -> Tensor:
        """Sets the gradients of the mean loss over some batches, and returns it: a scalar without gradient.

        Raises:
            UsageError: a batch is no pair of tensors.
            ResourceError: memory does not suffice for the fewest images at a time.
        """
        for batch in batches:
            check_batch(batch)
        if self.mixup is not None:
            batches = [mix_batch(self.mixup, *batch) for batch in batches]
        while True:
            try:
                return self._gradients(batches)
            except (RuntimeError, MemoryError) as exc:
                if not is_out_of_memory(exc):
                    raise
                reason = describe(exc)
            self._halve(batches, reason)  # out here, for the exception refers to all that is to be freed

    def apply(self) -> None:
        """Makes the optimiser take its step; raises ResourceError where it has no memory for it."""
        try:
            self.precision.step(self.optimizer)
        except (RuntimeError, MemoryError) as exc:
            if not is_out_of_memory(exc):
                raise
            raise ResourceError(f"out of memory in the optimiser's step ({describe(exc)})") from exc

    def _gradients(self, batches: Sequence[Batch]) -> Tensor:
        self.optimizer.zero_grad()
        parts, images = self._parts(batches), sum(len(batch[0]) for batch in batches)
        device = self.precision.device
        total = torch.zeros((), device=device)
        for part in parts:
            inputs, targets = (tensor.to(device) for tensor in part)
            with self.precision.autocast(), cached_weights():
                output = self.precision.full(self.model(inputs))
                value = self.loss(output, targets, inputs)
            if len(parts) > 1:
                value = value * (len(inputs) / images)
            self.precision.backward(value)
            total += value.detach()
        return total

    def _parts(self, batches: Sequence[Batch]) -> list[Batch]:
        """Returns the batches in parts of about the same number of images, none of more than ``size``."""
        parts: list[Batch] = []
        for batch in batches:
            images = len(batch[0])
            count = math.ceil(images / self.size) if self.size else 1
            count = max(1, min(count, images // self._fewest))
            parts.extend([batch] if count == 1 else zip(*(t.tensor_split(count) for t in batch), strict=True))
        return parts

    def _largest(self, batches: Sequence[Batch]) -> int:
        return max(len(part[0]) for part in self._parts(batches))

    def _halve(self, batches: Sequence[Batch], reason: str) -> None:
        """Halves the images at a time; raises ResourceError where they are the fewest there can be."""
        self.optimizer.zero_grad()
        free_memory(self.model, self.precision.device)
        before = self._largest(batches)
        self.size = max(self._fewest, math.ceil(before / 2))
        now = self._largest(batches)
        if now == before:
            shape = "x".join(map(str, batches[0][0].shape[1:]))
            few = f"{now} {'image' if now == 1 else 'images'}"
            raise ResourceError(f"out of memory with {few} of {shape} at a time, the fewest there can be ({reason})")
        _log.warning(
            "out of memory with %s images at a time: going on with %s, whose gradients add up to the same step",
            before, now,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Returns the images at a time that memory allowed, so that a resumed training takes the same steps."""
        return {"size": self.size}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        self.size = state["size"]


def batches_by_step(batches: Iterable[Batch], count: int) -> Iterator[list[Batch]]:
    """Yields the batches of each step, ``count`` of them; the last step has what is left.

    >>> [len(step) for step in batches_by_step([(torch.ones(1),)] * 5, 2)]
    [2, 2, 1]
    """
    rest = iter(batches)
    while step := list(itertools.islice(rest, count)):
        yield step


def steps_per_epoch(loader: Sized, grad_accum: int) -> int:
    """Returns the number of steps of an epoch.

    Raises:
        UsageError: there is less than one batch a step, or the loader has no length.

    >>> steps_per_epoch(range(5), 2)
    3
    """
    if grad_accum < 1:
        raise UsageError(f"grad_accum must be at least 1, got {grad_accum}")
    try:
        batches = len(loader)
    except TypeError as exc:  # as of a stream
        raise UsageError(
            "the loader has no length, which learning rates and rounds are planned by: give its data set a __len__, "
            "the number of its items"
        ) from exc
    return max(1, math.ceil(batches / grad_accum))
