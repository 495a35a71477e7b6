"""The one training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from compressor.checkpointing.progress import TrainingProgress, remaining_batches
from compressor.data.distributed_sampler import shard_loader
from compressor.data.splits import check_pictures
from compressor.distributed.devices import find_device
from compressor.distributed.replicas import ReplicaSync
from compressor.formats.errors import ResourceError
from compressor.training.checkpointer import TrainingCheckpointer
from compressor.training.divergence import DivergedError, check_loss
from compressor.training.evaluation import evaluate
from compressor.training.metrics import SharingMetrics, SharingMonitor
from compressor.training.mixed_precision import MixedPrecision
from compressor.training.mixup import Mixer
from compressor.training.model_ema import ModelEma
from compressor.training.optim import Schedule, use_fused_kernels
from compressor.training.rollback import roll_back
from compressor.training.step import Loss, TrainStep, batches_by_step

__all__ = ["Epoch", "evaluate_after_epoch", "train"]

OnStep = Callable[[int, int, Tensor], None]
STEPS_BETWEEN_CHECKS = 50  # steps, on a GPU, between two looks at the loss


@dataclass(frozen=True)
class Epoch:
    """Where training stands after an epoch.

    Args:
        number: from 1.
        epochs: of how many.
        loss: mean over the epoch.
        lr: mean over the optimiser's groups of parameters, as timm's summary has it.
        sharing: how far the sharing of the weights has come; None where none are shared.
    """

    number: int
    epochs: int
    loss: float
    lr: float = 0.0
    sharing: SharingMetrics | None = None


def train(
    model: nn.Module,
    loader: DataLoader[Any],
    loss: Loss,
    optimizer: Optimizer,
    schedule: Schedule,
    epochs: int,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_step: OnStep | None = None,
    device: str | None = None,
    amp: bool = False,
    checkpointer: TrainingCheckpointer | None = None,
    grad_accum: int = 1,
    mixup: Mixer | None = None,
    model_ema_decay: float = 0.0,
) -> None:
    """Train a model in place.

    Where the loss is no longer a number, training goes back to where the epoch began, and on at half the learning
    rate. Where memory runs out, fewer images go through the model at a time, for the same step.

    Args:
        loader: gives (inputs, targets).
        loss: of (output, targets, inputs), a scalar.
        schedule: moved on after every step.
        on_epoch: told after every epoch.
        on_step: told after every step: steps done, in all, and the mean loss of the epoch so far, a scalar; to read it
            from a GPU is to wait for all that was asked of it.
        device: where, such as "cuda:1", and where the model stays; None for the fastest there is.
        amp: automatic mixed precision, in ``on_epoch`` too: bf16, or fp16 on a GPU that does not know it.
        keeper: keeps the training in checkpoints, and lets it go on from one.
        grad_accum: batches of a step, whose gradients are added up: a batch that is so many times as large.
        mixup: what mixes each batch, such as ``timm.data.Mixup``.
        model_ema_decay: of the average of the weights over the steps, which is what is evaluated, and what the model
            has in the end; 0: the last weights are.

    Raises QualityError when the loss is no longer a number for the fourth time, ResourceError where there is no memory
    for one image or no such device here, UsageError for what is no device, InterruptionError where the checkpoints
    are told to stop it.
    """
    checkpointer = checkpointer or TrainingCheckpointer(None, model, {})
    precision = MixedPrecision(find_device(device), amp)
    model.to(precision.device)
    with checkpointer.stoppable_training():
        train_step, team = (
            TrainStep(precision, model, optimizer, loss, mixup),
            ReplicaSync(model, optimizer, checkpointer.told_to_stop),
        )
        average = ModelEma(model, model_ema_decay) if model_ema_decay else None
        parts = {"schedule": schedule, "scaler": precision.scaler, "stepper": train_step, "average": average}
        model.train()
        at = checkpointer.begin(shard_loader(loader), epochs, grad_accum, optimizer, **parts)
        use_fused_kernels(optimizer)
        team.broadcast()
        while at.epochs < epochs:
            try:
                _run_epoch(at, train_step, team, schedule, checkpointer, on_step, average)
            except DivergedError as why:
                at = roll_back(checkpointer, optimizer, schedule, at, why)
                continue
            team.broadcast()
            check_pictures(checkpointer.loader)
            if on_epoch is not None:
                with precision.autocast(cache_enabled=False), nullcontext() if average is None else average.in_place():
                    on_epoch(_epoch(at, epochs, optimizer))
            at = TrainingProgress(at.epochs + 1, rollbacks=at.rollbacks)
            checkpointer.after_epoch(at, team.stopping())
        if average is not None:
            average.put()
            team.broadcast()


def _epoch(at: TrainingProgress, epochs: int, optimizer: Optimizer) -> Epoch:
    """Say where training stands at the end of an epoch."""
    lr = fmean(group["lr"] for group in optimizer.param_groups)
    return Epoch(at.epochs + 1, epochs, float(at.loss) / max(at.batches, 1), lr)


def _run_epoch(
    at: TrainingProgress,
    train_step: TrainStep,
    team: ReplicaSync,
    schedule: Schedule,
    checkpointer: TrainingCheckpointer,
    on_step: OnStep | None,
    average: ModelEma | None,
) -> None:
    """Train from a position to the end of its epoch; it moves on. Raises DivergedError for a loss that is no number."""
    known = at_hand(train_step.precision.device)
    team.seed_rank(checkpointer.step(at), at.batches > 0)
    for batches in batches_by_step(remaining_batches(checkpointer.loader, at), checkpointer.grad_accum):
        try:
            value = team.mean(train_step.gradients(batches), sum(len(batch[0]) for batch in batches))
            if known:
                check_loss(value)
            train_step.apply()
        except ResourceError as exc:
            raise ResourceError(f"step {checkpointer.step(at) + 1}: {exc}{checkpointer.save_on_error(at)}") from exc
        schedule.step()
        if average is not None:
            average.update()
        at.loss, at.batches = at.loss + value * len(batches), at.batches + len(batches)
        # To ask a GPU for the loss is to wait until it has done all it was given. The sum of losses is no number once
        # one was none, so it is asked now and then: what was done to the weights since is lost when we go back.
        if not known and checkpointer.step(at) % STEPS_BETWEEN_CHECKS == 0:
            check_loss(at.loss)
        checkpointer.after_step(at, team.stopping())
        if on_step is not None:
            on_step(checkpointer.step(at), checkpointer.epochs * checkpointer.steps, at.loss / at.batches)
        team.seed_rank(checkpointer.step(at))
    checkpointer.check(at)


def at_hand(device: torch.device) -> bool:
    """Tell whether a value on the device can be read without waiting for all that was asked of it before."""
    return device.type == "cpu"


def evaluate_after_epoch(
    model: nn.Module,
    val: Iterable[Any] | None,
    watch: SharingMonitor,
    on_epoch: Callable[[Epoch, float | None], None] | None,
) -> Callable[[Epoch], None]:
    """Give what evaluates a model after each epoch, where there is a data set for it, and tells of it."""

    def told(epoch: Epoch) -> None:
        top1 = None if val is None else evaluate(model, val).top1
        if on_epoch is not None:
            on_epoch(replace(epoch, sharing=watch.measure()), top1)

    return told
