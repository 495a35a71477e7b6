"""One step of an optimiser, on one batch or several, in as many parts as memory calls for."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from torch.optim import Optimizer

from compressor.formats.errors import ResourceError, UsageError
from compressor.ops.buffer_pool import give_back
from compressor.sharing.parametrization import cached_weights
from compressor.training.mixup import Mixer, mix_batch

__all__ = ["Loss", "TrainStep", "batches_by_step", "out_of_memory", "predict", "steps_per_epoch"]

_log = logging.getLogger(__name__)
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Batch = Sequence[Tensor]


class TrainStep:
    """Takes an optimiser's steps, each on the mean loss over all the images it is given.

    Where memory runs out, half as many images go through the model at a time, from then on: their gradients, each
    weighted by its share of the images, add up to the same step. BatchNorm alone notices: it sees fewer at a time.

    Args:
        loss: of (output, targets, inputs), a mean over the images.
        mixup: what mixes each batch, if any.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, loss: Loss, mixup: Mixer | None = None
    ) -> None:
        self.accelerator, self.model, self.optimizer, self.loss = accelerator, model, optimizer, loss
        self.mixup = mixup
        self.size = 0
        """The most images at a time; 0: each batch as it comes."""
        normed = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
        self.least = 2 if normed else 1  # BatchNorm cannot train on one image

    def gradients(self, batches: Sequence[Batch]) -> Tensor:
        """Set the gradients of the mean loss over some batches, and give it: a scalar without gradient.

        Raises ResourceError where memory does not suffice for one image at a time.
        """
        if self.mixup is not None:
            batches = [mix_batch(self.mixup, *batch) for batch in batches]
        while True:
            try:
                return self._gradients(batches)
            except (RuntimeError, MemoryError) as exc:
                if not out_of_memory(exc):
                    raise
                said = _figures(exc)
            self._halve(batches, said)  # out here: the exception holds on to all that is to be freed

    def apply(self) -> None:
        """Let the optimiser take its step; raises ResourceError where it has no memory to."""
        try:
            self.optimizer.step()
        except (RuntimeError, MemoryError) as exc:
            if not out_of_memory(exc):
                raise
            raise ResourceError(f"out of memory in the optimiser's step ({_figures(exc)})") from exc

    def _gradients(self, batches: Sequence[Batch]) -> Tensor:
        self.optimizer.zero_grad()
        parts, images = self._parts(batches), sum(len(batch[0]) for batch in batches)
        total = torch.zeros((), device=self.accelerator.device)
        for part in parts:
            inputs, targets = send_to_device(part, self.accelerator.device)
            with self.accelerator.autocast(), cached_weights():
                value = self.loss(self.model(inputs), targets, inputs)
            if len(parts) > 1:
                value = value * (len(inputs) / images)
            self.accelerator.backward(value)
            total += value.detach()
        return total

    def _parts(self, batches: Sequence[Batch]) -> list[Batch]:
        """Cut batches into parts of about the same number of images."""
        parts: list[Batch] = []
        for batch in batches:
            images = len(batch[0])
            count = math.ceil(images / self.size) if self.size else 1
            count = max(1, min(count, images // self.least))
            parts.extend([batch] if count == 1 else zip(*(t.tensor_split(count) for t in batch), strict=True))
        return parts

    def _largest(self, batches: Sequence[Batch]) -> int:
        return max(len(part[0]) for part in self._parts(batches))

    def _halve(self, batches: Sequence[Batch], said: str) -> None:
        self.optimizer.zero_grad()
        give_back()
        clear_device_cache(garbage_collection=True)
        before = self._largest(batches)
        self.size = max(self.least, math.ceil(before / 2))
        now = self._largest(batches)
        if now == before:
            shape = "x".join(map(str, batches[0][0].shape[1:]))
            few = f"{now} {'image' if now == 1 else 'images'}"
            raise ResourceError(f"out of memory with {few} of {shape} at a time, the fewest there can be ({said})")
        _log.warning(
            "out of memory with %s images at a time: going on with %s, whose gradients add up to the same step",
            before, now,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Give what was learnt about memory, so that a training that is resumed takes the same steps."""
        return {"size": self.size}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put it back."""
        self.size = state["size"]


def predict(model: nn.Module, inputs: Tensor, device: torch.device) -> Tensor:
    """Give the class of each image, int64[n], on the CPU; where memory runs out, of half of them at a time.

    Raises ResourceError where there is none for one image.
    """
    try:
        classes: Tensor = model(inputs.to(device)).argmax(dim=-1).cpu()
        return classes
    except (RuntimeError, MemoryError) as exc:
        if not out_of_memory(exc):
            raise
        if len(inputs) == 1:
            shape = "x".join(map(str, inputs.shape[1:]))
            raise ResourceError(f"out of memory in evaluation, with 1 image of {shape} ({_figures(exc)})") from exc
    give_back()
    clear_device_cache()
    return torch.cat([predict(model, half, device) for half in inputs.chunk(2)])


def out_of_memory(exc: BaseException) -> bool:
    """Tell whether an error means that memory ran out, on the CPU or a GPU.

    >>> out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."))
    True
    >>> out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    False
    """
    return isinstance(exc, MemoryError | torch.OutOfMemoryError) or (
        isinstance(exc, Exception) and should_reduce_batch_size(exc)
    )


def _figures(exc: BaseException) -> str:
    """Give what torch says of it, without where in its sources."""
    said = " ".join(str(exc).split()) or "no more is known"
    return said[max(0, said.find("you tried to allocate")) :][:200].rstrip(". ")


def batches_by_step(batches: Iterable[Batch], count: int) -> Iterator[list[Batch]]:
    """Give the batches of one step after the other, ``count`` each; the last has what is left.

    >>> [len(step) for step in batches_by_step([(torch.ones(1),)] * 5, 2)]
    [2, 2, 1]
    """
    rest = iter(batches)
    while step := list(itertools.islice(rest, count)):
        yield step


def steps_per_epoch(loader: Sized, grad_accum: int) -> int:
    """Count the steps of an epoch; raises UsageError for less than one batch a step.

    >>> steps_per_epoch(range(5), 2)
    3
    """
    if grad_accum < 1:
        raise UsageError(f"grad_accum must be at least 1, got {grad_accum}")
    return max(1, math.ceil(len(loader) / grad_accum))
