"""The shares of several processes: every image is somebody's, and no step is one process's alone."""

from __future__ import annotations

import pytest

from compressor.data.distributed_sampler import ShardedBatchSampler, rank_share

BATCHES = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10]]


@pytest.mark.parametrize(
    ("count", "shares"),
    [
        (1, [BATCHES]),
        (2, [[[0, 1], [4, 5], [8, 10]], [[2, 3], [6, 7], [9]]]),
        (3, [[[0, 1], [6, 9]], [[2, 3], [7, 10]], [[4, 5], [8]]]),
    ],
)
def test_batches_are_shared_out(count: int, shares: list[list[list[int]]]) -> None:
    samplers = [ShardedBatchSampler(BATCHES, rank, count) for rank in range(count)]
    assert [list(sampler) for sampler in samplers] == shares
    assert {len(sampler) for sampler in samplers} == {len(shares[0])}


def test_of_fewer_items_than_processes_each_takes_all() -> None:
    assert [rank_share([[7]], rank, 2) for rank in (0, 1)] == [[7], [7]]
    assert [rank_share([[7, 8]], rank, 2) for rank in (0, 1)] == [[7, 8], [7, 8]]
    assert [rank_share([[7, 8, 9]], rank, 2) for rank in (0, 1)] == [[7, 9], [8]]
