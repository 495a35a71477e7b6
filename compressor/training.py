"""The one training loop, and evaluation; devices and processes are accelerate's business."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import is_bf16_available, patch_environment, send_to_device
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from compressor.formats.errors import MissingError, QualityError, UsageError
from compressor.resuming import Keeper, Position, batches_from
from compressor.schedule import Schedule
from compressor.sharing import cached_weights

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
        _accelerator(device, amp) as accelerator,
        _prepared(accelerator, model, optimizer, loader) as prepared,
        heeding,
    ):
        _run_epochs(accelerator, *prepared, loss, schedule, epochs, on_epoch, on_step, keeper)


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
    if keeper is not None:
        at = keeper.begin(loader, epochs, optimizer=optimizer, schedule=schedule, scaler=accelerator.scaler)
    while at.epochs < epochs:
        for batch in batches_from(loader, at):
            value = _step(accelerator, model, optimizer, loss, *send_to_device(batch, accelerator.device))
            schedule.step()
            at.loss, at.batches = at.loss + value, at.batches + 1
            if keeper is not None:
                keeper.after_step(at)
            if on_step is not None:
                on_step(at.epochs * updates + at.batches, epochs * updates)
        _end_epoch(at, epochs, on_epoch)
        at = Position(at.epochs + 1)
        if keeper is not None:
            keeper.after_epoch(at)


def _step(
    accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, loss: Loss, inputs: Tensor, targets: Tensor
) -> Tensor:
    """Train on one batch; give its loss."""
    with accelerator.autocast(), cached_weights():
        value = loss(model(inputs), targets, inputs)
    optimizer.zero_grad()
    accelerator.backward(value)
    optimizer.step()
    return value.detach()


def _end_epoch(at: Position, epochs: int, on_epoch: Callable[[Epoch], None] | None) -> None:
    number, mean = at.epochs + 1, float(at.loss) / max(at.batches, 1)
    if not math.isfinite(mean):
        raise QualityError(f"the loss of epoch {number} is {mean}: training has diverged; try a lower --lr")
    if on_epoch is not None:
        on_epoch(Epoch(number, epochs, mean))


def find_device(asked: str | None) -> torch.device:
    """Give the device asked for, None for accelerate's choice; raises UsageError for one that torch does not have."""
    if asked is None:
        with _accelerator(None, amp=False) as accelerator:
            return torch.device(accelerator.device)
    found = torch.accelerator.current_accelerator()
    count = torch.accelerator.device_count() if found is not None else 0
    known = ["cpu", *(f"{found}:{number}" for number in range(count))]
    if asked not in [*known, *(name.partition(":")[0] for name in known)]:
        raise UsageError(f"device {asked!r}: torch {torch.__version__} has none such here; it has {', '.join(known)}")
    return torch.device(asked)


@contextmanager
def _accelerator(device: str | None, amp: bool) -> Iterator[Accelerator]:
    """Give an Accelerator with settings of its own: accelerate keeps the first one's for all the process otherwise.

    Those of an Accelerator that the caller may have are put back in the end.
    """
    chosen = {} if device is None else {"ACCELERATE_TORCH_DEVICE": find_device(device)}
    states = AcceleratorState._shared_state, PartialState._shared_state
    before = [dict(state) for state in states]
    for state in states[: 1 + len(chosen)]:  # where no device is asked for, a caller's choice holds
        state.clear()
    try:
        with patch_environment(**chosen):
            half = _half_precision(PartialState().device) if amp else None
            accelerator = Accelerator(mixed_precision=half)
        yield accelerator
        accelerator.free_memory()
    finally:
        for state, kept in zip(states, before, strict=True):
            state.clear()
            state.update(kept)


def _half_precision(device: torch.device) -> str:
    """Name bf16 where the device computes in it, for it needs no scaling of the loss; else fp16."""
    if device.type == "cuda":  # older ones emulate it, slowly
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return "bf16" if device.type == "cpu" or is_bf16_available(True) else "fp16"


@contextmanager
def _prepared(
    accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, loader: DataLoader[Any]
) -> Iterator[tuple[nn.Module, Optimizer, DataLoader[Any]]]:
    """Let accelerate prepare all three, and take off the model again what it leaves there.

    It marks the model, so that the next run would not place it, and has its forward pass run under autocast. Of its
    loader we take what is inside: it loads a batch ahead, so that what is drawn for it could not be drawn again.
    """
    left = "_is_accelerate_prepared", "_original_forward", "forward"
    before = {name: vars(model)[name] for name in left if name in vars(model)}
    try:
        *prepared, batches = accelerator.prepare(model, optimizer, loader)
        yield cast(tuple[nn.Module, Optimizer, DataLoader[Any]], (*prepared, batches.base_dataloader))
    finally:
        for name in left:
            vars(model).pop(name, None)
        vars(model).update(before)


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
