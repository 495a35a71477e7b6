"""Two processes train one model: see ``tests/helpers/several.py``, whose tests these are; and launchers people use."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from compressor.data import distributed_sampler
from compressor.data.distributed_sampler import ShardedBatchSampler, shard_loader
from compressor.distributed import collectives
from compressor.formats.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.helpers.several", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 13


TORCHRUN = ["torch.distributed.run", "--nproc-per-node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]  # --cpu starts one process only


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_launchers(launcher: list[str], tmp_path: Path) -> None:
    words = "test_resnet --from-scratch --epochs 1 --batch-size 256 --calibration-images 32 --device cpu -o out"
    command = [sys.executable, "-m", *launcher, "-m", "compressor.cli", *words.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("top-1 on 360 test images") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.summary.csv"]


def test_every_image_is_in_one_share() -> None:
    for images, batch, count in ((40, 6, 2), (41, 4, 3), (7, 2, 4), (16, 4, 4)):
        batches = DataLoader(range(images), batch).batch_sampler  # type: ignore[arg-type]
        shares = [list(ShardedBatchSampler(batches, rank, count)) for rank in range(count)]
        assert {len(share) for share in shares} == {len(ShardedBatchSampler(batches, 0, count))}
        for step in zip(*shares, strict=True):
            taken = [image for share in step for image in share]
            assert all(step), "none is without images"
            assert len(set(taken)) == len(taken) or all(share == step[0] for share in step)
        assert {image for share in shares for batch_ in share for image in batch_} == set(range(images))


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield 0


FEW = TensorDataset(torch.zeros(4))
LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "stream": lambda: DataLoader(Stream()),
    "DistributedSampler": lambda: DataLoader(FEW, sampler=DistributedSampler(FEW, num_replicas=2, rank=0)),
}


@pytest.mark.parametrize("what", LOADERS)
def test_what_cannot_be_shared_out_is_refused(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    monkeypatch.setattr(distributed_sampler, "init_processes", lambda _: None)
    with pytest.raises(UsageError, match=what):
        shard_loader(LOADERS[what]())
