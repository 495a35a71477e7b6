"""The one training loop, and evaluation; devices and processes are accelerate's business."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from compressor.formats.errors import MissingError, QualityError, UsageError
from compressor.sharing import cached_weights

__all__ = ["Epoch", "Evaluation", "evaluate", "make_optimizer", "train"]

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class StepSchedule(Protocol):
    """A learning-rate schedule that moves on with every optimiser step, as torch's do."""

    def step(self) -> None:
        """Set the learning rate of the next step."""


@dataclass(frozen=True)
class Epoch:
    """Where training stands after an epoch: its number from 1, of how many, and the mean loss over it."""

    number: int
    epochs: int
    loss: float


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


def train(
    model: nn.Module,
    loader: DataLoader[Any],
    loss: Loss,
    optimizer: Optimizer,
    schedule: StepSchedule,
    epochs: int,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> None:
    """Train a model in place.

    Args:
        loader: gives (inputs, targets).
        loss: of (output, targets, inputs), a scalar.
        schedule: moved on after every step.
        on_epoch: told after every epoch.
        on_step: told after every step: steps done, and in all.

    Raises QualityError when the loss is no longer a number.
    """
    accelerator = Accelerator()
    prepared = accelerator.prepare(model, optimizer, loader)
    model, optimizer, loader = cast(tuple[nn.Module, Optimizer, DataLoader[Any]], prepared)
    model.train()
    done = 0
    for number in range(1, epochs + 1):
        total, batches = torch.zeros((), device=accelerator.device), 0
        for inputs, targets in loader:
            with cached_weights():
                value = loss(model(inputs), targets, inputs)
            optimizer.zero_grad()
            accelerator.backward(value)
            optimizer.step()
            schedule.step()
            total, batches, done = total + value.detach(), batches + 1, done + 1
            if on_step is not None:
                on_step(done, epochs * len(loader))
        mean = float(total) / max(batches, 1)
        if not math.isfinite(mean):
            raise QualityError(f"the loss of epoch {number} is {mean}: training has diverged; try a lower --lr")
        if on_epoch is not None:
            on_epoch(Epoch(number, epochs, mean))
    accelerator.free_memory()


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable[Any]) -> Evaluation:
    """Classify a data set, in eval mode; the model's mode is left as it was."""
    was_training = model.training
    model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with cached_weights():
        correct = [model(inputs.to(device)).argmax(dim=-1).cpu() == targets.cpu() for inputs, targets in loader]
    model.train(was_training)
    if not correct:
        raise MissingError("the data set to evaluate on is empty")
    return Evaluation(torch.cat(correct))


def make_optimizer(
    parameters: list[dict[str, Any]], opt: str, lr: float, sched: str, epochs: int, loader: Sized
) -> tuple[Optimizer, StepSchedule]:
    """Build timm's optimiser and schedule by their timm names; the schedule moves by the step."""
    try:
        optimizer = create_optimizer_v2(parameters, opt=opt, lr=lr)
        schedule, _ = create_scheduler_v2(
            optimizer, sched=sched, num_epochs=epochs, step_on_epochs=False, updates_per_epoch=len(loader)
        )
    except (ValueError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"optimiser {opt!r} with schedule {sched!r}: {error}") from None
    return optimizer, _TimmSteps(schedule)


class _TimmSteps:
    """timm's schedule counts the steps itself when asked to; here it only has to be told of each."""

    def __init__(self, schedule: Any) -> None:
        self.schedule = schedule
        self.steps = 0

    def step(self) -> None:
        """Set the learning rate of the next step."""
        self.steps += 1
        if self.schedule is not None:
            self.schedule.step_update(self.steps)
