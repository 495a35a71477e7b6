"""Sharing the batches of a data set out among training processes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Sampler

from compressor.distributed import collectives
from compressor.distributed.devices import init_processes
from compressor.formats.errors import UsageError

__all__ = ["ShardedBatchSampler", "rank_share", "shard_for_evaluation", "shard_loader", "with_batches"]


class ShardedBatchSampler(Sampler[list[Any]]):
    """This process's share of the batches of a sampler: one of every ``count`` consecutive batches.

    All processes draw all batches in the same way, and those of a step at once, so that no other random draw comes
    between them. An incomplete last step, or one of unequal batches, is pooled and divided evenly by item; if it has no
    more items than there are processes, each process takes all of them.

    Args:
        batches: a batch sampler.
        rank: number of this process, from 0.
        count: number of processes.

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
    """Returns what one process takes of the batches of a step.

    Args:
        step: the batches of the step, at most ``count``.
        rank: number of the process, from 0.
        count: number of processes.
    """
    if len(step) == count and len({len(batch) for batch in step}) == 1:
        return step[rank]
    pooled = [item for batch in step for item in batch]
    return pooled[rank::count] if len(pooled) > count else pooled


def shard_loader(loader: DataLoader[Any], device: str | None = None) -> DataLoader[Any]:
    """Returns a loader of this process's share of the batches.

    Args:
        loader: the loader of all batches; returned itself if there is one process, or if it is sharded already.
        device: where the processes will train; they are connected here if they are not yet.

    Raises:
        UsageError: it is no DataLoader, has no batch sampler to share out, or its sampler distributes the data itself.
    """
    if not isinstance(loader, DataLoader):
        raise UsageError(
            f"training takes a torch.utils.data.DataLoader of batches (inputs, targets), got {type(loader).__name__}; "
            "DataLoader(batches, batch_size=None) makes one of a list of batches"
        )
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
    """Returns a copy of a loader that loads other batches.

    Args:
        loader: the loader to copy.
        batches: the batch sampler, or any iterable of lists of indices, of the copy.
    """
    copied = copy.copy(loader)
    copied._iterator = None  # persistent workers belong to the original
    object.__setattr__(copied, "batch_sampler", batches)  # DataLoader.__setattr__ refuses it after construction
    return copied


def shard_for_evaluation(loader: Iterable[Any]) -> tuple[Iterable[Any], list[slice], int] | None:
    """Shares the batches of a loader out for evaluation.

    Returns:
        This process's batches, their places among all images, and the number of all images; None if every process has
        to evaluate all batches, because there is one process or the loader's order cannot be divided.
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
