"""The progress of a training run, and the remaining batches of an epoch that was interrupted."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler

from compressor.data.distributed_sampler import with_batches
from compressor.rng import random_state, set_random_state

__all__ = ["TrainingProgress", "loader_rng_state", "remaining_batches", "set_generators"]


@dataclass
class TrainingProgress:
    """How far a training run has come.

    Args:
        epochs: number of finished epochs.
        batches: number of finished batches of the current epoch.
        loss: sum of the loss over these batches, a scalar.
        rng_at_epoch_start: ``loader_rng_state`` before the loader drew the order of the current epoch.
        rollbacks: how often the training went back to a checkpoint because the loss was not finite.
    """

    epochs: int = 0
    batches: int = 0
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    rng_at_epoch_start: Mapping[str, Any] = field(default_factory=dict)
    rollbacks: int = 0


def loader_rng_state(loader: DataLoader[Any]) -> dict[str, Any]:
    """Returns the state of all random generators that the loader's next epoch draws from."""
    return {"global": random_state(), "own": [generator.get_state() for generator in _generators(loader)]}


def remaining_batches(loader: DataLoader[Any], position: TrainingProgress) -> Iterator[Any]:
    """Yields the remaining batches of an epoch, without loading those before them where the loader allows it.

    The order is drawn again from the random state at the start of the epoch; augmentation and model then continue from
    the current state. Random numbers that worker processes draw by themselves start anew, unless they follow from the
    sampler's items, as those of ``splits.SeededRandomSampler`` do.

    Args:
        loader: the loader of the training.
        position: how far the training has come in this epoch.
    """
    if not position.batches:
        yield from loader
        return
    now = random_state()
    set_random_state(position.rng_at_epoch_start["global"])
    set_generators(loader, position.rng_at_epoch_start["own"])
    if loader.batch_sampler is None or isinstance(loader.dataset, IterableDataset):
        batches = iter(loader)  # the batches of a stream can only be skipped by loading them
        _skip(batches, position.batches)
        set_random_state(now)
        yield from batches
        return
    rest = _RemainingBatches(loader.batch_sampler, position.batches, lambda: set_random_state(now))
    yield from with_batches(loader, rest)


def _skip(batches: Iterator[Any], count: int) -> None:
    next(itertools.islice(batches, count, count), None)


class _RemainingBatches(Sampler[Any]):
    """The batches of a sampler without the first ones; calls a function after skipping those."""

    def __init__(self, batches: Any, skipped: int, after_skipping: Callable[[], None]) -> None:
        self.batches, self.skipped, self.after_skipping = batches, skipped, after_skipping

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.batches)
        _skip(batches, self.skipped)
        self.after_skipping()
        yield from batches

    def __len__(self) -> int:
        return len(self.batches) - self.skipped


def _generators(loader: DataLoader[Any]) -> list[torch.Generator]:
    """Returns the generators of a loader and its samplers, each once."""
    batches = loader.batch_sampler
    owners = loader, loader.sampler, batches, getattr(batches, "sampler", None)
    generators = [getattr(owner, "generator", None) for owner in owners]
    return list({id(generator): generator for generator in generators if generator is not None}.values())


def set_generators(loader: DataLoader[Any], states: Sequence[Tensor]) -> None:
    """Restores the states of the loader's own generators, as ``loader_rng_state`` returned them."""
    for generator, state in zip(_generators(loader), states, strict=True):
        generator.set_state(state)
