"""Where a training stands, to the batch; how it is kept in checkpoints, and how it goes on from one."""

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
    """What has a state, as torch's modules and optimisers do."""

    def state_dict(self) -> Any:
        """Give all of it."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Put it back."""


class TrainingCheckpointer:
    """Keeps one training, all that changes in it and what it depends on, to go on from and to go back to.

    Args:
        checkpoints: where; None: only the state that the epoch began with, in memory. That takes as much as all that
            training changes: of each trained parameter, with AdamW, value and two moments, 12 bytes in float32.
        subject: what is trained, with all its state.
        facts: what must be the same to go on, JSON values.
    """

    def __init__(self, checkpoints: Checkpoints | None, subject: Stateful, facts: Mapping[str, Any]) -> None:
        self.checkpoints, self.facts = checkpoints, facts
        self.parts: dict[str, Stateful] = {"subject": subject}
        self._copy: dict[str, Any] | None = None

    def begin(
        self, loader: DataLoader[Any], epochs: int, grad_accum: int, optimizer: Optimizer, **parts: Stateful | None
    ) -> TrainingProgress:
        """Give where to begin; the state is put back by then.

        Args:
            grad_accum: batches of a step.
            parts: what changes in training beside the subject and the optimiser.
        """
        self.parts |= {"optimizer": optimizer}
        self.parts |= {name: part for name, part in parts.items() if part is not None}
        self.loader, self.epochs, self.grad_accum, self.optimizer = loader, epochs, grad_accum, optimizer
        self.steps = steps_per_epoch(loader, grad_accum)
        self.facts = {**self.facts, "epochs": epochs, "steps of an epoch": self.steps, "processes": world_size()}
        state = None if self.checkpoints is None else self.checkpoints.take(self.facts)
        if state is not None:
            return self._go_on(state)
        position = TrainingProgress(rng_at_epoch_start=loader_rng_state(loader))
        self.save(position)
        return position

    def _go_on(self, state: Mapping[str, Any]) -> TrainingProgress:
        """Put back what another process saved; raises UsageError where it is not what trains here."""
        assert self.checkpoints is not None
        try:
            return self._put_back(state)
        except (RuntimeError, ValueError, KeyError, TypeError) as exc:  # as torch says that names or shapes are others
            if is_out_of_memory(exc):
                raise
            said = f"no {exc}" if isinstance(exc, KeyError) else " ".join(str(exc).split())[:200].rstrip(".")
            raise UsageError(
                f"{self.checkpoints.folder} holds what another version of this program has saved ({said}). Go on "
                "with that one, or begin anew with --force (force=True)"
            ) from exc

    def step(self, position: TrainingProgress) -> int:
        """Count the steps taken up to a position."""
        return position.epochs * self.steps + math.ceil(position.batches / self.grad_accum)

    def where(self) -> str:
        """Say, to end a sentence with, where the state is kept and how to go on from it."""
        return " in the model" if self.checkpoints is None else f" in {self.checkpoints.folder}: {HOW_TO_RESUME}"

    def save_on_error(self, position: TrainingProgress) -> str:
        """Save, for the training ends here; say so, where it could be."""
        if self.checkpoints is None or not self.save(position):
            return ""
        return f"; the state after step {self.step(position)} is kept{self.where()}"

    @contextmanager
    def stoppable_training(self) -> Iterator[None]:
        """Let it be known that the training will stop when it is told to."""
        if self.checkpoints is None:
            yield
            return
        self.checkpoints.training = True
        try:
            yield
        finally:
            self.checkpoints.training = False

    def after_epoch(self, position: TrainingProgress, stopping: bool) -> None:
        """Keep a state to go back to. Raises InterruptionError where the training is to stop."""
        position.rng_at_epoch_start = loader_rng_state(self.loader)
        if self.checkpoints is not None and stopping:
            self._stop(position)
        if self.checkpoints is not None or position.epochs < self.epochs:
            self.save(position)

    def after_step(self, position: TrainingProgress, stopping: bool) -> None:
        """Save where it is time to. Raises InterruptionError, having saved, where the training is to stop.

        Raises DivergedError instead of saving what has diverged.
        """
        if self.checkpoints is None:
            return
        middle = 0 < position.batches < len(self.loader)  # after the last batch, the end of the epoch is near
        if stopping:
            self.check(position)
            self._stop(position)
        elif middle and is_main_process() and self.checkpoints.due(self.step(position)):
            try:
                self.check(position)
            except DivergedError:
                if world_size() > 1:  # the others do not look now: all go back together, at the end of the epoch
                    return
                raise
            self.save(position)

    def told_to_stop(self) -> bool:
        """Tell whether this process was told to stop, and keeps what it has done."""
        return self.checkpoints is not None and self.checkpoints.stop

    def check(self, position: TrainingProgress) -> None:
        """Raise DivergedError where the loss, in any step of the epoch so far, or a weight is not finite."""
        check_loss(position.loss)
        check_weights(self.optimizer)

    def save(self, position: TrainingProgress) -> bool:
        """Keep the state as one to go back to; tell whether that was possible."""
        if self.checkpoints is None:
            self._copy = _copied(self._state(position))
            return True
        if not is_main_process():
            return True
        try:
            self._save(position)
        except (ResourceError, UsageError) as exc:  # nothing is lost as yet: better to go on than to stop
            _log.warning("no checkpoint of step %s: %s; the training goes on", self.step(position), exc)
            return False
        return True

    def rollback(self, position: TrainingProgress) -> TrainingProgress | None:
        """Put back the state that the epoch began with, or an earlier one; None where none is left."""
        if self.checkpoints is None:
            state = _copied(self._copy)  # training on will write into what is put back
        else:
            folder, epoch_start = self.checkpoints, position.epochs * self.steps
            state = broadcast_state(lambda: {"state": folder.back_to(epoch_start)})["state"]
        return None if state is None else self._put_back(state)

    def _put_back(self, state: Mapping[str, Any]) -> TrainingProgress:
        for name, part in self.parts.items():
            if name in state["parts"]:  # another device may scale the loss where the one before did not
                part.load_state_dict(state["parts"][name])
        set_random_state(state["random"])
        position = TrainingProgress(**state["position"])
        if not position.batches:
            set_generators(self.loader, position.rng_at_epoch_start["own"])
        return position

    def _stop(self, position: TrainingProgress) -> None:
        main_process_first(lambda: self._save(position))
        done = f"{self.step(position)} of {self.epochs * self.steps}"
        raise InterruptionError(f"stopped after step {done}, which is kept{self.where()}")

    def _state(self, position: TrainingProgress) -> dict[str, Any]:
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        return {"parts": parts, "position": vars(position), "random": random_state()}

    def _save(self, position: TrainingProgress) -> None:
        assert self.checkpoints is not None
        # the state to go back to: it does not depend on how often we save
        epoch_start = position.epochs * self.steps
        self.checkpoints.save(self.step(position), self._state(position), self.facts, keep=epoch_start)


def _copied(value: Any) -> Any:
    """Copy a nesting of dict, list and tuple, and all tensors in it to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (list, tuple) else value
