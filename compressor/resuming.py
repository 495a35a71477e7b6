"""Where a training stands, to the batch; how it is kept in checkpoints, and how it goes on from one."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler

from compressor.checkpoint import Checkpoints
from compressor.formats.errors import InterruptionError, ResourceError, UsageError
from compressor.processes import count, first, is_first
from compressor.random_state import random_state, set_random_state
from compressor.state_file import checksum

if TYPE_CHECKING:
    from compressor.core import Compressor

__all__ = ["HOW_TO_GO_ON", "Keeper", "Position", "Stateful", "batches_from", "order_state"]

_log = logging.getLogger(__name__)
HOW_TO_GO_ON = "the same command with --resume (resume=True) goes on"


class Stateful(Protocol):
    """What has a state, as torch's modules and optimisers do."""

    def state_dict(self) -> Any:
        """Give all of it."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Put it back."""


@dataclass
class Position:
    """Where a training stands.

    Args:
        epochs: that are over.
        batches: done in the one that is not.
        loss: sum over them, a scalar.
        begun: all that is random, as the epoch began, when the loader had not yet drawn its order.
    """

    epochs: int = 0
    batches: int = 0
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    begun: Mapping[str, Any] = field(default_factory=dict)


def order_state(loader: DataLoader[Any]) -> dict[str, Any]:
    """Give the state of all that the loader's next epoch will draw from."""
    return {"global": random_state(), "own": [generator.get_state() for generator in _generators(loader)]}


def batches_from(loader: DataLoader[Any], position: Position) -> Iterator[Any]:
    """Give the batches of an epoch that are still to be done; those before them are not loaded.

    The order is drawn again, as it was when the epoch began; what is drawn from then on, by augmentation and model,
    goes on where it is now. What worker processes draw by themselves begins anew: let it follow from what the
    sampler gives, as ``splits.PictureOrder`` does.
    """
    if not position.batches:
        yield from loader
        return
    now = random_state()
    set_random_state(position.begun["global"])
    _set_generators(loader, position.begun["own"])
    if loader.batch_sampler is None or isinstance(loader.dataset, IterableDataset):
        batches = iter(loader)  # nothing to skip but by loading it
        _skip(batches, position.batches)
        set_random_state(now)
        yield from batches
        return
    rest = copy.copy(loader)
    rest._iterator = None  # with its own workers, where they persist
    left = _Rest(loader.batch_sampler, position.batches, lambda: set_random_state(now))
    object.__setattr__(rest, "batch_sampler", left)  # which a DataLoader refuses once it is made
    yield from rest


def _skip(batches: Iterator[Any], count: int) -> None:
    next(itertools.islice(batches, count, count), None)


class _Rest(Sampler[Any]):
    """The batches of a sampler but for the first; between the two something is done."""

    def __init__(self, batches: Any, skipped: int, between: Callable[[], None]) -> None:
        self.batches, self.skipped, self.between = batches, skipped, between

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.batches)
        _skip(batches, self.skipped)
        self.between()
        yield from batches

    def __len__(self) -> int:
        return len(self.batches) - self.skipped


def _generators(loader: DataLoader[Any]) -> list[torch.Generator]:
    """List the generators of a loader and its samplers, each once."""
    batches = loader.batch_sampler
    owners = loader, loader.sampler, batches, getattr(batches, "sampler", None)
    found = {id(own): own for owner in owners if (own := getattr(owner, "generator", None)) is not None}
    return list(found.values())


def _set_generators(loader: DataLoader[Any], states: Sequence[Tensor]) -> None:
    for generator, state in zip(_generators(loader), states, strict=True):
        generator.set_state(state)


class Keeper:
    """Keeps one training in checkpoints: all that changes in it, and what it depends on.

    Args:
        checkpoints: where.
        subject: what is trained, with all its state.
        facts: what must be the same to go on, JSON values.
    """

    def __init__(self, checkpoints: Checkpoints, subject: Stateful, facts: Mapping[str, Any]) -> None:
        self.checkpoints, self.facts = checkpoints, facts
        self.parts: dict[str, Stateful] = {"subject": subject}
        self.stopping: bool | None = None
        """Whether several processes have agreed to stop after this step; None where there is one."""

    @classmethod
    def of(cls, job: Compressor, checkpoints: Checkpoints | None, **how: Any) -> Keeper | None:
        """Keep a job's fine-tuning; None where there are no checkpoints.

        Args:
            how: it is trained.
        """
        if checkpoints is None:
            return None
        rules = [rule.to_dict() for rule in job.policy.rules]
        loss = {"distill": job.distill if job.teacher else 0.0, "temperature": job.temperature}
        weights = f"CRC-32 {checksum(job.original):08x}"
        return cls(checkpoints, job, {"rules": rules, **loss, "seed": job.seed, **how, "weights": weights})

    def begin(self, loader: DataLoader[Any], epochs: int, **parts: Stateful | None) -> Position:
        """Give where to begin; the state is put back by then.

        Args:
            parts: what changes in training beside the subject.
        """
        self.parts |= {name: part for name, part in parts.items() if part is not None}
        self.loader, self.epochs = loader, epochs
        self.facts = {**self.facts, "epochs": epochs, "steps of an epoch": len(loader)}
        self.facts["processes"] = count()
        state = self.checkpoints.take(self.facts)
        if state is None:
            return Position(begun=order_state(loader))
        for name, part in self.parts.items():
            if name in state["parts"]:  # another device may scale the loss where the one before did not
                part.load_state_dict(state["parts"][name])
        set_random_state(state["random"])
        position = Position(**state["position"])
        if not position.batches:
            _set_generators(loader, position.begun["own"])
        return position

    @contextmanager
    def heeding(self) -> Iterator[None]:
        """Let it be known that the training will stop when it is told to."""
        self.checkpoints.training = True
        try:
            yield
        finally:
            self.checkpoints.training = False

    def after_epoch(self, position: Position) -> None:
        """Save; as for ``after_step``."""
        position.begun = order_state(self.loader)
        self.after_step(position)

    def after_step(self, position: Position) -> None:
        """Save where it is time to. Raises InterruptionError, having saved, where the training is to stop."""
        step = position.epochs * len(self.loader) + position.batches
        if self.checkpoints.stop if self.stopping is None else self.stopping:
            first(lambda: self._save(step, position))
            raise InterruptionError(
                f"stopped after step {step} of {self.epochs * len(self.loader)}, which is kept in "
                f"{self.checkpoints.folder}: {HOW_TO_GO_ON}"
            )
        middle = 0 < position.batches < len(self.loader)  # after the last batch, the end of the epoch is near
        if is_first() and (not position.batches or (middle and self.checkpoints.due(step))):
            try:
                self._save(step, position)
            except (ResourceError, UsageError) as exc:  # nothing is lost as yet: better to go on than to stop
                _log.warning("no checkpoint of step %s: %s; the training goes on", step, exc)

    def _save(self, step: int, position: Position) -> None:
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        state = {"parts": parts, "position": vars(position), "random": random_state()}
        self.checkpoints.save(step, state, self.facts)
