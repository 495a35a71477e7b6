"""Saves a training to the batch, resumes it, and returns it to an earlier state."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from compressor.checkpointing.manager import Checkpoints
from compressor.checkpointing.progress import TrainingProgress, loader_rng_state, set_generators
from compressor.checkpointing.serialization import broadcast_state
from compressor.distributed.collectives import is_main_process, main_process_first, world_size
from compressor.formats.errors import InterruptionError, ResourceError, UsageError
from compressor.rng import random_state, set_random_state
from compressor.training.divergence import DivergedError, check_loss, check_weights
from compressor.training.out_of_memory import is_out_of_memory
from compressor.training.step import steps_per_epoch

__all__ = ["HOW_TO_RESUME", "Stateful", "TrainingCheckpointer"]

_log = logging.getLogger(__name__)
HOW_TO_RESUME = "the same command with --resume (resume=True) goes on"


class Stateful(Protocol):
    """An object that saves and restores its state, as torch's modules and optimisers do."""

    def state_dict(self) -> Any:
        """Returns the whole state."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Restores a state."""


class TrainingCheckpointer:
    """Saves everything that changes in one training, to resume it or to roll it back.

    Args:
        checkpoints: where to save; None: only the state at the start of the epoch is held, in memory. It takes as much
            as all that training changes: for each trained parameter with AdamW a value and two moments, 12 bytes in
            float32.
        subject: what is trained, with all its state.
        fingerprint: what must be the same to resume the training; JSON values.
    """

    def __init__(self, checkpoints: Checkpoints | None, subject: Stateful, fingerprint: Mapping[str, Any]) -> None:
        self.checkpoints, self.fingerprint = checkpoints, fingerprint
        self.parts: dict[str, Stateful] = {"subject": subject}
        self._epoch_start: dict[str, Any] | None = None

    def begin(
        self, loader: DataLoader[Any], epochs: int, grad_accum: int, optimizer: Optimizer, **parts: Stateful | None
    ) -> TrainingProgress:
        """Returns where the training begins; where it is resumed, the state is restored.

        Args:
            epochs: of the whole training.
            grad_accum: batches of a step.
            parts: what changes in training beside the subject and the optimiser, by its name in the checkpoints.

        Raises:
            UsageError: the checkpoint was saved by another training, or by another version of this program.
        """
        self.parts |= {"optimizer": optimizer}
        self.parts |= {name: part for name, part in parts.items() if part is not None}
        self.loader, self.epochs, self.grad_accum, self.optimizer = loader, epochs, grad_accum, optimizer
        self.steps = steps_per_epoch(loader, grad_accum)
        lengths = {"epochs": epochs, "steps of an epoch": self.steps, "processes": world_size()}
        self.fingerprint = {**self.fingerprint, **lengths}
        state = None if self.checkpoints is None else self.checkpoints.take(self.fingerprint)
        if state is not None:
            return self._resume(state)
        progress = TrainingProgress(rng_at_epoch_start=loader_rng_state(loader))
        self.save(progress)
        return progress

    def _resume(self, state: Mapping[str, Any]) -> TrainingProgress:
        """Restores what another process saved; raises UsageError where it does not fit what is trained here."""
        assert self.checkpoints is not None
        try:
            return self._restore(state)
        except (RuntimeError, ValueError, KeyError, TypeError) as exc:  # torch's for names or shapes that do not fit
            if is_out_of_memory(exc):
                raise
            reason = f"no {exc}" if isinstance(exc, KeyError) else " ".join(str(exc).split())[:200].rstrip(".")
            raise UsageError(
                f"{self.checkpoints.folder} holds what another version of this program has saved ({reason}). Go on "
                "with that one, or begin anew with --force (force=True)"
            ) from exc

    def step(self, progress: TrainingProgress) -> int:
        """Returns the number of steps taken."""
        return progress.epochs * self.steps + math.ceil(progress.batches / self.grad_accum)

    def where(self) -> str:
        """Returns the end of a message: where the state is kept, and how to resume from it."""
        return " in the model" if self.checkpoints is None else f" in {self.checkpoints.folder}: {HOW_TO_RESUME}"

    def save_on_error(self, progress: TrainingProgress) -> str:
        """Saves the state where an error ends the training; returns the end of its message, "" where none is kept."""
        if self.checkpoints is None or not self.save(progress):
            return ""
        return f"; the state after step {self.step(progress)} is kept{self.where()}"

    @contextmanager
    def stoppable_training(self) -> Iterator[None]:
        """Marks the checkpoints as those of a running training, which stops when they are told to stop it."""
        if self.checkpoints is None:
            yield
            return
        self.checkpoints.training = True
        try:
            yield
        finally:
            self.checkpoints.training = False

    def after_epoch(self, progress: TrainingProgress, stopping: bool) -> None:
        """Saves the state at the start of the next epoch.

        Raises:
            InterruptionError: the training stops here; it is saved.
        """
        progress.rng_at_epoch_start = loader_rng_state(self.loader)
        if self.checkpoints is not None and stopping:
            self._stop(progress)
        if self.checkpoints is not None or progress.epochs < self.epochs:
            self.save(progress)

    def after_step(self, progress: TrainingProgress, stopping: bool) -> None:
        """Saves the state where a checkpoint is due.

        Raises:
            InterruptionError: the training stops here; it is saved.
            DivergedError: the state has diverged, and is not saved.
        """
        if self.checkpoints is None:
            return
        in_mid_epoch = 0 < progress.batches < len(self.loader)  # after the last batch, after_epoch is about to save
        if stopping:
            self.check(progress)
            self._stop(progress)
        elif in_mid_epoch and is_main_process() and self.checkpoints.due(self.step(progress)):
            try:
                self.check(progress)
            except DivergedError:
                if world_size() > 1:  # the other processes do not check now: all roll back at the end of the epoch
                    return
                raise
            self.save(progress)

    def must_stop(self) -> bool:
        """Whether this process was told to stop, and can save its state."""
        return self.checkpoints is not None and self.checkpoints.stop

    def check(self, progress: TrainingProgress) -> None:
        """Raises DivergedError where the loss of any step of this epoch, or a weight, is not finite."""
        check_loss(progress.loss)
        check_weights(self.optimizer)

    def save(self, progress: TrainingProgress) -> bool:
        """Saves the state as one to roll back to; returns whether that was possible."""
        if self.checkpoints is None:
            self._epoch_start = _copy_to_cpu(self._state(progress))
            return True
        if not is_main_process():
            return True
        try:
            self._save(progress)
        except (ResourceError, UsageError) as exc:  # nothing is lost yet, so that training on is better than stopping
            _log.warning("no checkpoint of step %s: %s; the training goes on", self.step(progress), exc)
            return False
        return True

    def rollback(self, progress: TrainingProgress) -> TrainingProgress | None:
        """Restores the state at the start of the epoch, or an earlier one; returns None where none is left."""
        if self.checkpoints is None:
            state = _copy_to_cpu(self._epoch_start)  # a copy, because training writes into what is restored
        else:
            folder, epoch_start = self.checkpoints, progress.epochs * self.steps
            state = broadcast_state(lambda: {"state": folder.back_to(epoch_start)})["state"]
        return None if state is None else self._restore(state)

    def _restore(self, state: Mapping[str, Any]) -> TrainingProgress:
        for name, part in self.parts.items():
            if name in state["parts"]:  # a device without loss scaling has saved no scaler
                part.load_state_dict(state["parts"][name])
        set_random_state(state["random"])
        progress = TrainingProgress(**state["position"])
        if not progress.batches:
            set_generators(self.loader, progress.rng_at_epoch_start["own"])
        return progress

    def _stop(self, progress: TrainingProgress) -> None:
        main_process_first(lambda: self._save(progress))
        done = f"{self.step(progress)} of {self.epochs * self.steps}"
        raise InterruptionError(f"stopped after step {done}, which is kept{self.where()}")

    def _state(self, progress: TrainingProgress) -> dict[str, Any]:
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        return {"parts": parts, "position": vars(progress), "random": random_state()}

    def _save(self, progress: TrainingProgress) -> None:
        assert self.checkpoints is not None
        # Rolling back to the start of the epoch makes the result independent of how often checkpoints are saved.
        epoch_start = progress.epochs * self.steps
        self.checkpoints.save(self.step(progress), self._state(progress), self.fingerprint, keep=epoch_start)


def _copy_to_cpu(value: Any) -> Any:
    """Copies a nesting of dict, list and tuple, with all its tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copy_to_cpu(item) for key, item in value.items()}
    return type(value)(map(_copy_to_cpu, value)) if type(value) in (list, tuple) else value
