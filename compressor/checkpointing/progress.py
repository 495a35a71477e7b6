"""Where a training stands in the order of its data: the rest of an epoch, as if it had not been left."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler

from compressor.rng import random_state, set_random_state

__all__ = ["TrainingProgress", "loader_rng_state", "remaining_batches", "set_generators"]


@dataclass
class TrainingProgress:
    """Where a training stands.

    Args:
        epochs: that are over.
        batches: done in the one that is not.
        loss: sum over them, a scalar.
        begun: all that is random, as the epoch began, when the loader had not yet drawn its order.
        returns: how often it went back because the loss was no longer a number.
    """

    epochs: int = 0
    batches: int = 0
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    rng_at_epoch_start: Mapping[str, Any] = field(default_factory=dict)
    rollbacks: int = 0


def loader_rng_state(loader: DataLoader[Any]) -> dict[str, Any]:
    """Give the state of all that the loader's next epoch will draw from."""
    return {"global": random_state(), "own": [generator.get_state() for generator in _generators(loader)]}


def remaining_batches(loader: DataLoader[Any], position: TrainingProgress) -> Iterator[Any]:
    """Give the batches of an epoch that are still to be done; those before them are not loaded.

    The order is drawn again, as it was when the epoch began; what is drawn from then on, by augmentation and model,
    goes on where it is now. What worker processes draw by themselves begins anew: let it follow from what the
    sampler gives, as ``splits.PictureOrder`` does.
    """
    if not position.batches:
        yield from loader
        return
    now = random_state()
    set_random_state(position.rng_at_epoch_start["global"])
    set_generators(loader, position.rng_at_epoch_start["own"])
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


def set_generators(loader: DataLoader[Any], states: Sequence[Tensor]) -> None:
    """Put back the states of the loader's own generators, as ``order_state`` gave them."""
    for generator, state in zip(_generators(loader), states, strict=True):
        generator.set_state(state)
