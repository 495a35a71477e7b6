"""The one training loop, and evaluation; devices and processes are accelerate's business."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from compressor.devices import accelerating, find_device
from compressor.formats.errors import MissingError, QualityError
from compressor.processes import add_up
from compressor.resuming import Keeper, Position, batches_from
from compressor.schedule import Schedule
from compressor.sharding import dealt, shared_out
from compressor.sharing import cached_weights
from compressor.splits import UNREADABLE, check_pictures
from compressor.team import Team

__all__ = ["Epoch", "Evaluation", "evaluate", "find_device", "train"]

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


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
    schedule: Schedule,
    epochs: int,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    device: str | None = None,
    amp: bool = False,
    keeper: Keeper | None = None,
) -> None:
    """Train a model in place.

    Args:
        loader: gives (inputs, targets).
        loss: of (output, targets, inputs), a scalar.
        schedule: moved on after every step.
        on_epoch: told after every epoch.
        on_step: told after every step: steps done, and in all.
        device: where, such as "cuda:1", and where the model stays; None for accelerate's choice.
        amp: automatic mixed precision, in ``on_epoch`` too: bf16, or fp16 on a GPU that does not know it.
        keeper: keeps the training in checkpoints, and lets it go on from one.

    Raises QualityError when the loss is no longer a number, UsageError for a device that torch does not have,
    InterruptionError where the checkpoints are told to stop it.
    """
    heeding = nullcontext() if keeper is None else keeper.heeding()
    with (
        accelerating(device, amp) as accelerator,
        _prepared(accelerator, model, optimizer) as prepared,
        heeding,
    ):
        _run_epochs(accelerator, *prepared, shared_out(loader), loss, schedule, epochs, on_epoch, on_step, keeper)


def _run_epochs(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    loader: DataLoader[Any],
    loss: Loss,
    schedule: Schedule,
    epochs: int,
    on_epoch: Callable[[Epoch], None] | None,
    on_step: Callable[[int, int], None] | None,
    keeper: Keeper | None,
) -> None:
    model.train()
    at, updates = Position(), len(loader)
    team = Team(model, optimizer, keeper)
    if keeper is not None:
        at = keeper.begin(loader, epochs, optimizer=optimizer, schedule=schedule, scaler=accelerator.scaler)
    team.agree()
    while at.epochs < epochs:
        team.draw_alone(at.epochs * updates + at.batches, at.batches > 0)
        for batch in batches_from(loader, at):
            value = _step(accelerator, team, model, optimizer, loss, *send_to_device(batch, accelerator.device))
            schedule.step()
            at.loss, at.batches = at.loss + value, at.batches + 1
            if keeper is not None:
                keeper.after_step(at)
            if on_step is not None:
                on_step(at.epochs * updates + at.batches, epochs * updates)
            team.draw_alone(at.epochs * updates + at.batches)
        team.agree()
        check_pictures(loader)
        _end_epoch(at, epochs, on_epoch)
        at = Position(at.epochs + 1)
        if keeper is not None:
            keeper.after_epoch(at)


def _step(
    accelerator: Accelerator,
    team: Team,
    model: nn.Module,
    optimizer: Optimizer,
    loss: Loss,
    inputs: Tensor,
    targets: Tensor,
) -> Tensor:
    """Train on one batch, of all processes; give its loss."""
    with accelerator.autocast(), cached_weights():
        value = loss(model(inputs), targets, inputs)
    optimizer.zero_grad()
    accelerator.backward(value)
    mean = team.mean(value.detach(), len(inputs))
    optimizer.step()
    return mean


def _end_epoch(at: Position, epochs: int, on_epoch: Callable[[Epoch], None] | None) -> None:
    number, mean = at.epochs + 1, float(at.loss) / max(at.batches, 1)
    if not math.isfinite(mean):
        raise QualityError(f"the loss of epoch {number} is {mean}: training has diverged; try a lower --lr")
    if on_epoch is not None:
        on_epoch(Epoch(number, epochs, mean))


@contextmanager
def _prepared(
    accelerator: Accelerator, model: nn.Module, optimizer: Optimizer
) -> Iterator[tuple[nn.Module, Optimizer]]:
    """Let accelerate prepare both, and take off the model again what it leaves there.

    It marks the model, so that the next run would not place it, and has its forward pass run under autocast. To it the
    model is for evaluation, or it would wrap it for several processes; and the loader is not its to prepare: its own
    loads a batch ahead, so that what is drawn for it could not be drawn again. See docs/decisions/0010.
    """
    left = "_is_accelerate_prepared", "_original_forward", "forward"
    before = {name: vars(model)[name] for name in left if name in vars(model)}
    try:
        yield (
            cast(nn.Module, accelerator.prepare_model(model, evaluation_mode=True)),
            cast(Optimizer, accelerator.prepare_optimizer(optimizer)),
        )
    finally:
        for name in left:
            vars(model).pop(name, None)
        vars(model).update(before)


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
        right: Tensor = model(inputs.to(device)).argmax(dim=-1).cpu() == wanted
        return right.to(torch.uint8).masked_fill(wanted == UNREADABLE, _LEFT_OUT)

    if (shares := dealt(loader)) is None:
        return torch.cat([torch.zeros(0, dtype=torch.uint8), *(found(*batch) for batch in loader)])
    own, places, images = shares
    answers = torch.zeros(images, dtype=torch.uint8, device=device)
    for place, batch in zip(places, own, strict=True):
        answers[place] = found(*batch).to(device)
    add_up([answers])
    return answers.cpu()
