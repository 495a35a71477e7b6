"""What the processes that train one model do together in every step, so that its state stays the same in all."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressor.distributed import collectives
from compressor.formats.errors import UsageError
from compressor.rng import seed_all

__all__ = ["ReplicaSync"]

RUNNING_STATISTICS = ("running_mean", "running_var")


class ReplicaSync:
    """Keeps the replicas of a model the same in the processes that train it; in a single process it does nothing.

    Random numbers follow from seed, step and, for images and dropout, from the rank; all others are the same in all
    processes. So they need not be saved.

    Args:
        model: that is trained, the same in all processes but for rounding.
        optimizer: of the model.
        stop: whether this process was asked to stop; all then stop after the same step.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, stop: Callable[[], bool]) -> None:
        self._model, self._optimizer, self._stop = model, optimizer, stop
        self._several = collectives.world_size() > 1
        self._seed, self._step = collectives.main_process_first(torch.initial_seed), 0
        self._requested: Tensor | None = None
        self._agreed = False

    def broadcast(self) -> None:
        """Sets weights, codebooks and statistics in all processes to those of the first, and seeds all alike.

        They differ by rounding where a GPU sums in no fixed order.

        Raises:
            UsageError: the processes' tensors differ in name, dtype or shape.
        """
        if not self._several:
            return
        named = dict(self._model.named_parameters()) | dict(self._model.named_buffers())
        kinds = [f"{name} {tensor.dtype} {tuple(tensor.shape)}" for name, tensor in named.items()]
        checksums = collectives.all_gather_object(zlib.crc32("\n".join(kinds).encode()))
        if differing := [process for process, checksum in enumerate(checksums) if checksum != checksums[0]]:
            raise UsageError(
                f"process {differing[0]} has other tensors in its model than process 0: all have to build and prepare "
                "the same model, from the same weights"
            )
        collectives.broadcast_tensors(named.values())
        self._seed_all("alike")

    def seed_rank(self, step: int, epoch_started: bool = True) -> None:
        """Seeds the processes differently for the next batch, once they have drawn the epoch's order alike.

        Args:
            step: of the whole training, from 0.
            epoch_started: whether the order has been drawn.
        """
        self._step = step
        if self._several and epoch_started:
            self._seed_all(str(collectives.rank()))

    def _seed_all(self, name: str) -> None:
        seed_all(zlib.crc32(f"{self._seed} {self._step} {name}".encode()))

    def mean(self, loss: Tensor, images: int) -> Tensor:
        """Returns the mean loss over the images of all processes, and averages gradients and statistics likewise.

        Args:
            loss: the mean over this process's images, a scalar.
            images: the number of this process's images.
        """
        if not self._several:
            return loss
        parameters = [p for group in self._optimizer.param_groups for p in group["params"] if p.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        running = [buffer for name, buffer in self._model.named_buffers() if name.endswith(RUNNING_STATISTICS)]
        facts = torch.tensor([0.0, self._stop(), *(p.grad is not None for p in parameters)], device=loss.device)
        facts[0] = loss
        collectives.all_reduce_mean([facts, *gradients, *running], weight=images)
        for number, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True), 2):
            if parameter.grad is None and facts[number] > 0:  # else it is unused in all, and must not even decay
                parameter.grad = gradient
        self._agree(facts[1])
        self._seed_all("alike")
        return facts[0]

    def _agree(self, requested: Tensor) -> None:
        """Agrees to stop after this step where any process was asked to by the previous one.

        To read this step's answer would be to wait for the GPU.
        """
        self._agreed = self._requested is not None and bool(self._requested > 0)
        self._requested = requested

    def stopping(self) -> bool:
        """Whether all processes have agreed to stop after this step; for a single process, whether it was asked to."""
        return self._agreed if self._several else self._stop()
