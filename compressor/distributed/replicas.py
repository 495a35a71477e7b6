"""What the processes that train one model do together at every step, so that its state stays the same in all."""

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
    """The processes that train a model; one alone does nothing here.

    What they draw at random follows from seed, step and process, and needs no keeping: images and dropout are drawn by
    each alone, all else alike.

    Args:
        model, optimizer: trained, and alike in all processes but for rounding.
        stop: tells whether this process was told to stop; then all do, after the same step.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, stop: Callable[[], bool]) -> None:
        self._model, self._optimizer, self._stop = model, optimizer, stop
        self._several = collectives.world_size() > 1
        self._seed, self._step = collectives.main_process_first(torch.initial_seed), 0
        self._told: Tensor | None = None
        self._agreed = False

    def broadcast(self) -> None:
        """Let all have the first one's weights, codebooks and statistics, and draw alike from here on.

        They differ by rounding where a GPU sums in no fixed order. Raises UsageError where their tensors are not even
        of the same shapes.
        """
        if not self._several:
            return
        named = dict(self._model.named_parameters()) | dict(self._model.named_buffers())
        kinds = [f"{name} {tensor.dtype} {tuple(tensor.shape)}" for name, tensor in named.items()]
        known = collectives.all_gather_object(zlib.crc32("\n".join(kinds).encode()))
        if odd := [number for number, kind in enumerate(known) if kind != known[0]]:
            raise UsageError(
                f"process {odd[0]} has other tensors in its model than process 0: all have to build and prepare the "
                "same model, from the same weights"
            )
        collectives.broadcast_tensors(named.values())
        self._seed_all("alike")

    def seed_rank(self, step: int, epoch_started: bool = True) -> None:
        """Let what is drawn for the next batch differ between processes; an epoch's order is drawn alike before that.

        Args:
            step: of the whole training, from 0.
            epoch_started: whether the order has been drawn.
        """
        self._step = step
        if self._several and epoch_started:
            self._seed_all(str(collectives.rank()))

    def _seed_all(self, who: str) -> None:
        seed_all(zlib.crc32(f"{self._seed} {self._step} {who}".encode()))

    def mean(self, loss: Tensor, images: int) -> Tensor:
        """Give the mean loss over the images of all processes; gradients, too, become means over them all.

        Args:
            loss: the mean over this process's images, a scalar.
            images: how many they are.
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
        self._heed(facts[1])
        self._seed_all("alike")
        return facts[0]

    def _heed(self, stopping: Tensor) -> None:
        """Stop after this step where any was told to by the step before: so that no step waits for a GPU to tell."""
        self._agreed = self._told is not None and bool(self._told > 0)
        self._told = stopping

    def stopping(self) -> bool:
        """Tell whether all processes have agreed to stop after this step; one alone agrees with itself at once."""
        return self._agreed if self._several else self._stop()
