"""How the images of a data set are shared out among collectives."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Sampler

from compressor.distributed import collectives
from compressor.distributed.devices import init_processes
from compressor.formats.errors import UsageError

__all__ = ["ShardedBatchSampler", "rank_share", "shard_for_evaluation", "shard_loader"]


class ShardedBatchSampler(Sampler[list[Any]]):
    """This process's part of the batches of a sampler: of as many as there are processes it takes one.

    All processes draw all batches, alike, and at once, so that nothing random comes in between. The batches left over
    in the end are pooled and dealt out evenly; each process takes the whole of them where there are too few.

    Args:
        batches: a batch sampler.
        rank: number of this process, from 0.
        count: how many processes there are.

    Example:
        >>> [list(ShardedBatchSampler([[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10]], rank, 2)) for rank in (0, 1)]
        [[[0, 1], [4, 5], [8, 10]], [[2, 3], [6, 7], [9]]]
    """

    def __init__(self, batches: Any, rank: int, count: int) -> None:
        self.batches, self.rank, self.count = batches, rank, count

    def __iter__(self) -> Iterator[list[Any]]:
        drawn = iter([list(batch) for batch in self.batches])
        while step := list(itertools.islice(drawn, self.count)):
            yield rank_share(step, self.rank, self.count)

    def __len__(self) -> int:
        return -(-len(self.batches) // self.count)


def rank_share(step: Sequence[list[Any]], rank: int, count: int) -> list[Any]:
    """Give what one process takes of the batches of a step."""
    if len(step) == count and len({len(batch) for batch in step}) == 1:
        return step[rank]
    pooled = [item for batch in step for item in batch]
    return pooled[rank::count] if len(pooled) > count else pooled


def shard_loader(loader: DataLoader[Any], device: str | None = None) -> DataLoader[Any]:
    """Give a loader of this process's share; the loader itself where there is one process, or it is shared out.

    Args:
        device: that the processes will train on; they meet here.

    Raises UsageError for one that cannot be, or has a sampler that does so too.
    """
    init_processes(device)
    batches = loader.batch_sampler
    if collectives.world_size() == 1 or isinstance(batches, ShardedBatchSampler):
        return loader
    if batches is None or isinstance(loader.dataset, IterableDataset):
        raise UsageError("a loader without a batch sampler, as of a stream, cannot be shared out among processes")
    if isinstance(loader.sampler, DistributedSampler):
        raise UsageError("the loader has a DistributedSampler: leave it out, finetune() shares out the batches itself")
    return with_batches(loader, ShardedBatchSampler(batches, collectives.rank(), collectives.world_size()))


def with_batches(loader: DataLoader[Any], batches: Iterable[Any]) -> DataLoader[Any]:
    """Give a copy of a loader with other batches."""
    other = copy.copy(loader)
    other._iterator = None  # with its own workers, where they persist
    object.__setattr__(other, "batch_sampler", batches)  # which a DataLoader refuses once it is made
    return other


def shard_for_evaluation(loader: Iterable[Any]) -> tuple[Iterable[Any], list[slice], int] | None:
    """Deal the batches of a loader out for evaluation.

    Returns:
        This process's batches, where their images are among all, and how many there are in all; None where every
        process has to take all of them: there is one, or they come in no order that can be dealt out.
    """
    if collectives.world_size() == 1 or not isinstance(loader, DataLoader):
        return None
    if loader.batch_sampler is None or isinstance(loader.dataset, IterableDataset):
        return None
    batches = [list(batch) for batch in loader.batch_sampler]
    ends = list(itertools.accumulate(map(len, batches)))
    places = [slice(end - len(batch), end) for batch, end in zip(batches, ends, strict=True)]
    own = slice(collectives.rank(), None, collectives.world_size())
    return with_batches(loader, batches[own]), places[own], ends[-1] if ends else 0
