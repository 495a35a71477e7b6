"""The training loop."""

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
from compressor.data.splits import check_readable
from compressor.distributed.devices import find_device
from compressor.distributed.replicas import ReplicaSync
from compressor.formats.errors import ResourceError
from compressor.training.checkpointer import TrainingCheckpointer
from compressor.training.config import TrainingConfig
from compressor.training.divergence import DivergedError, check_loss
from compressor.training.evaluation import evaluate
from compressor.training.metrics import SharingMetrics, SharingMonitor
from compressor.training.mixed_precision import MixedPrecision
from compressor.training.mixup import mixup_for, split_mixer
from compressor.training.model_ema import ModelEma
from compressor.training.modes import train_mode
from compressor.training.optim import Schedule, use_fused_kernels
from compressor.training.rollback import roll_back
from compressor.training.step import Loss, TrainStep, batches_by_step

__all__ = ["Epoch", "OnEpoch", "OnStep", "evaluate_after_epoch", "train"]

OnStep = Callable[[int, int, Tensor], None]
"""Of the steps done, the steps in all, and the mean loss of the epoch so far, a scalar."""

STEPS_BETWEEN_CHECKS = 50  # steps on a GPU between two readings of the loss


@dataclass(frozen=True)
class Epoch:
    """The figures of an epoch of training.

    Args:
        number: of the epoch, from 1.
        epochs: number of epochs of the training.
        loss: mean over the epoch.
        lr: learning rate, the mean over the optimiser's parameter groups, as in timm's summary.
        sharing: how far the sharing of the weights has come; None where none are shared.
    """

    number: int
    epochs: int
    loss: float
    lr: float = 0.0
    sharing: SharingMetrics | None = None


OnEpoch = Callable[[Epoch, float | None], None]
"""Of an epoch, and top-1 on the validation images, 0 to 1; None where there are none."""


def train(
    model: nn.Module,
    loader: DataLoader[Any],
    loss: Loss,
    optimizer: Optimizer,
    schedule: Schedule,
    config: TrainingConfig | int | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_step: OnStep | None = None,
    device: str | None = None,
    amp: bool = False,
    checkpointer: TrainingCheckpointer | None = None,
    **overrides: Any,
) -> None:
    """Trains a model in place, in training mode but for modules in eval mode where the model is in training mode.

    Where the loss is no longer finite, training returns to the state at the start of the epoch and continues at half
    the learning rate. Where memory runs out, fewer images go through the model at a time, for the same step.

    Args:
        loader: of batches (inputs, targets).
        loss: of (output, targets, inputs), a scalar.
        schedule: its ``step()`` is called after every step of the optimiser.
        config: the options of the training, or its number of epochs. Of its fields the loop reads ``epochs``,
            ``grad_accum``, ``mixup``, ``cutmix``, ``smoothing`` and ``model_ema_decay``; with the last, the average of
            the weights is evaluated, and is what the model has at the end. The others describe ``loader``, ``loss``,
            ``optimizer`` and ``schedule``.
        on_epoch: called after every epoch.
        on_step: called after every step. Reading its loss from a GPU waits for all work that is queued there.
        device: where to train, such as "cuda:1", and where the model stays; None for the fastest there is.
        amp: automatic mixed precision, also in ``on_epoch``: bf16, or fp16 on a GPU without it.
        checkpointer: saves the training, and resumes it; None: a training that only rolls back, from memory.
        overrides: fields of ``TrainingConfig`` that win over ``config``; ``mixup`` may also be a ``Mixer``, such as
            ``timm.data.Mixup``, in place of all mixing.

    Raises:
        UsageError: an option or the device has a name or a value that cannot be.
        QualityError: the loss is not finite for the fourth time.
        ResourceError: there is no memory for one image, or no such device here.
        InterruptionError: the checkpoints were told to stop the training; it is saved.
    """
    options, mixup = split_mixer(overrides)
    config = TrainingConfig.resolve(config, options)
    mixup = mixup_for(model, config) if mixup is None else mixup
    checkpointer = checkpointer or TrainingCheckpointer(None, model, {})
    precision = MixedPrecision(find_device(device), amp)
    model.to(precision.device)
    with checkpointer.stoppable_training():
        train_step = TrainStep(precision, model, optimizer, loss, mixup)
        replicas = ReplicaSync(model, optimizer, checkpointer.must_stop)
        ema = ModelEma(model, config.model_ema_decay) if config.model_ema_decay else None
        # The names are those in the checkpoints on disk.
        parts = {"schedule": schedule, "scaler": precision.scaler, "stepper": train_step, "average": ema}
        train_mode(model)
        progress = checkpointer.begin(shard_loader(loader), config.epochs, config.grad_accum, optimizer, **parts)
        use_fused_kernels(optimizer)
        replicas.broadcast()
        while progress.epochs < config.epochs:
            try:
                _train_epoch(progress, train_step, replicas, schedule, checkpointer, on_step, ema)
            except DivergedError as exc:
                progress = roll_back(checkpointer, optimizer, schedule, progress, exc)
                continue
            replicas.broadcast()
            check_readable(checkpointer.loader)
            if on_epoch is not None:
                with precision.autocast(cache_enabled=False), nullcontext() if ema is None else ema.in_place():
                    on_epoch(_epoch(progress, config.epochs, optimizer))
            progress = TrainingProgress(progress.epochs + 1, rollbacks=progress.rollbacks)
            checkpointer.after_epoch(progress, replicas.stopping())
        if ema is not None:
            ema.copy_to_model()
            replicas.broadcast()


def _epoch(progress: TrainingProgress, epochs: int, optimizer: Optimizer) -> Epoch:
    """Returns the figures of the epoch whose batches are done."""
    lr = fmean(group["lr"] for group in optimizer.param_groups)
    return Epoch(progress.epochs + 1, epochs, float(progress.loss) / max(progress.batches, 1), lr)


def _train_epoch(
    progress: TrainingProgress,
    train_step: TrainStep,
    replicas: ReplicaSync,
    schedule: Schedule,
    checkpointer: TrainingCheckpointer,
    on_step: OnStep | None,
    ema: ModelEma | None,
) -> None:
    """Trains the rest of an epoch, and moves ``progress`` on; raises DivergedError for a loss that is not finite."""
    readable = is_readable_at_once(train_step.precision.device)
    replicas.seed_rank(checkpointer.step(progress), progress.batches > 0)
    for batches in batches_by_step(remaining_batches(checkpointer.loader, progress), checkpointer.grad_accum):
        try:
            loss = replicas.mean(train_step.gradients(batches), sum(len(batch[0]) for batch in batches))
            if readable:
                check_loss(loss)
            train_step.apply()
        except ResourceError as exc:
            step = checkpointer.step(progress) + 1
            raise ResourceError(f"step {step}: {exc}{checkpointer.save_on_error(progress)}") from exc
        schedule.step()
        if ema is not None:
            ema.update()
        progress.loss, progress.batches = progress.loss + loss * len(batches), progress.batches + len(batches)
        step = checkpointer.step(progress)
        # Reading the loss from a GPU waits until the GPU has done all its queued work, so it is read only now and
        # then. The sum of the losses is not finite once one of them was not; a rollback discards the steps since.
        if not readable and step % STEPS_BETWEEN_CHECKS == 0:
            check_loss(progress.loss)
        checkpointer.after_step(progress, replicas.stopping())
        if on_step is not None:
            on_step(step, checkpointer.epochs * checkpointer.steps, progress.loss / progress.batches)
        replicas.seed_rank(step)
    checkpointer.check(progress)


def is_readable_at_once(device: torch.device) -> bool:
    """Whether a value on the device can be read without waiting for work that is queued there."""
    return device.type == "cpu"


def evaluate_after_epoch(
    model: nn.Module,
    val: Iterable[Any] | None,
    monitor: SharingMonitor,
    on_epoch: OnEpoch | None,
) -> Callable[[Epoch], None]:
    """Returns a callback for ``train`` that evaluates the model after each epoch and passes the figures on.

    Args:
        val: batches (inputs, targets); None to evaluate nothing.
        monitor: of the model's sharing.
        on_epoch: called with the epoch, its ``sharing`` filled in, and top-1, 0 to 1; None without ``val``.
    """

    def after_epoch(epoch: Epoch) -> None:
        top1 = None if val is None else evaluate(model, val).top1
        if on_epoch is not None:
            kind = next((parameter.device.type for parameter in model.parameters()), "cpu")
            with torch.autocast(kind, enabled=False):  # the caller computes as the caller wishes
                on_epoch(replace(epoch, sharing=monitor.measure()), top1)

    return after_epoch
