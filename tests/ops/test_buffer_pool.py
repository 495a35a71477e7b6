"""Memory that is used again: never by two at a time, and not for longer than there is a use."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from compressor import Compressor, Policy, Rule
from compressor.ops.buffer_pool import SMALLEST, BufferPool, active_pool
from compressor.ops.gather_scatter import gather_codewords

CPU = torch.device("cpu")
SHAPE = (SMALLEST // 4, 2)


def pool_of(job: Compressor) -> BufferPool:
    """Returns the pool of the job's model."""
    gc.collect()
    container: Any = job.model.weight_sharing
    pool = container.pool
    assert isinstance(pool, BufferPool)
    return pool


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8, torch.int32, torch.bfloat16])
def test_no_two_have_the_same_memory(dtype: torch.dtype) -> None:
    pool = BufferPool()
    made = [pool.empty(SHAPE, dtype, CPU) for _ in range(3)]
    assert len({tensor.data_ptr() for tensor in made}) == 3
    assert {(tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) for tensor in made} == {(SHAPE, dtype, True)}


def test_memory_is_in_use_as_long_as_any_tensor_that_shares_it() -> None:
    pool = BufferPool()
    first = pool.empty(SHAPE, torch.float32, CPU)
    address, row = first.data_ptr(), first.detach()[1]
    del first
    assert pool.free_bytes == 0
    assert pool.empty(SHAPE, torch.float32, CPU).data_ptr() != address
    del row
    other = pool.empty(SHAPE[::-1], torch.float32, CPU)
    assert other.data_ptr() == address, "of as many numbers, whatever the shape"
    assert pool.empty(SHAPE, torch.int32, CPU).data_ptr() != address


def test_what_is_released_is_not_used_again() -> None:
    pool = BufferPool()
    in_use, free = (pool.empty(SHAPE, torch.float32, CPU) for _ in range(2))
    del free
    assert pool.free_bytes == 2 * SMALLEST
    pool.release()
    assert pool.free_bytes == 0
    in_use.fill_(1.0)
    del in_use
    assert pool.free_bytes == 0, "nor what was in use then"


def test_tensors_outlive_their_pool() -> None:
    pool = BufferPool()
    weights = pool.empty(SHAPE, torch.float32, CPU).fill_(1.0)
    del pool
    gc.collect()
    assert weights.sum() == weights.numel()


def test_a_pool_is_active_in_its_thread_alone() -> None:
    pool, threads = BufferPool(), ThreadPoolExecutor(1)
    with threads, pool.activate():
        assert active_pool() is pool
        assert threads.submit(active_pool).result() is not pool
        with BufferPool().activate():
            assert active_pool() is not pool
        assert active_pool() is pool
    assert active_pool() is not pool
    codebook, indices = torch.zeros(2), torch.zeros(SHAPE, dtype=torch.uint8)
    gather_codewords(codebook, indices)
    assert pool.free_bytes == 0


def one_step(job: Compressor) -> None:
    """Computes the gradients of a step, and frees them."""
    job.model(torch.randn(8, 400)).square().mean().backward()
    job.model.zero_grad()


def test_two_models_neither_share_nor_free_each_others_memory() -> None:
    policy = Policy([Rule("*", scheme="inq", bits=4)])
    jobs = [Compressor(nn.Sequential(nn.Linear(400, 200)), policy, teacher=None).prepare() for _ in range(2)]
    for job in jobs:
        one_step(job)
    first, second = map(pool_of, jobs)
    assert first is not second
    kept = first.free_bytes
    assert kept == second.free_bytes == 4 * 400 * 200
    addresses = [{buffer.data_ptr() for free in pool._free.values() for buffer in free} for pool in (first, second)]
    assert not addresses[0] & addresses[1]
    one_step(jobs[1])
    assert (first.free_bytes, second.free_bytes) == (kept, kept), "a step of one takes nothing of the other's"
    jobs[1].finish()
    del jobs[1]
    gc.collect()
    assert (first.free_bytes, second.free_bytes) == (kept, 0), "nor does its end free the other's"


def test_the_memory_goes_with_the_model() -> None:
    job = Compressor(nn.Sequential(nn.Linear(400, 200)), Policy([Rule("*", scheme="inq", bits=4)]), teacher=None)
    one_step(job.prepare())
    pool = weakref.ref(pool_of(job))
    del job
    gc.collect()
    assert pool() is None


@pytest.mark.parametrize("scheme", ["learnt", "kmeans", "wfn"])
def test_a_step_takes_what_the_one_before_left(scheme: str) -> None:
    """And the end of the compression frees it."""
    job = Compressor(nn.Sequential(nn.Linear(400, 200)), Policy([Rule("*", scheme=scheme)]), teacher=None).prepare()
    job.attach(torch.optim.SGD(job.param_groups(1e-3)), 100)
    sizes = []
    for _ in range(3):
        job.model.zero_grad()
        output = job.model(torch.randn(8, 400))
        (output.square().mean() + job.penalty(torch.tensor(1.0))).backward()
        del output
        job.model.zero_grad()
        sizes.append(pool_of(job).free_bytes)
    assert sizes[0] == sizes[1] == sizes[2] > 0
    pool = pool_of(job)
    job.finish()
    assert pool.free_bytes == 0


def test_threads_take_no_memory_from_each_other() -> None:
    pool, before = BufferPool(), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def take(thread: int) -> bool:
        kept = True
        for _ in range(2_000):
            mine = pool.empty(SHAPE, torch.float32, CPU)
            mine[0].fill_(thread)
            kept &= mine[0].tolist() == [thread] * 2
        return kept

    try:
        with ThreadPoolExecutor(4) as threads:
            assert all(threads.map(take, range(4)))
    finally:
        sys.setswitchinterval(before)


def test_a_copy_has_a_pool_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(400, 200))
    job = Compressor(model, Policy([Rule("*", scheme="learnt")]), teacher=None).prepare()
    one_step(job)
    other = copy.deepcopy(job)
    pool, copied = pool_of(job), pool_of(other)
    kept = pool.free_bytes
    assert copied is not pool
    assert not copied.free_bytes
    one_step(other)
    assert copied.free_bytes == kept
    other.finish()
    assert (pool.free_bytes, copied.free_bytes) == (kept, 0)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it is about Linux's C library")
def test_what_is_freed_is_kept_where_nobody_has_decided() -> None:
    """Counted in pages the system had to clear: 60 MB have 14,649; in some layouts one of three tensors moves."""
    script = """
import resource, torch
from compressor.cli.malloc import keep_freed_memory
print(keep_freed_memory())
for turn in range(9):
    if turn == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    made = [torch.ones(5_000_000) for _ in range(3)]
    del made
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 6)
"""
    names = "MALLOC_", "GLIBC_TUNABLES"
    plain = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    told, cleared = [], []
    for decided in (
        {},
        {"MALLOC_TRIM_THRESHOLD_": "65536"},
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=65536"},
    ):
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, env=plain | decided, check=True)
        said = done.stdout.split()
        told.append(said[0])
        cleared.append(int(said[1]))
    if told[0] == "False":
        pytest.skip("the C library is not glibc")
    assert told == ["True", "False", "False"]
    assert 2 * cleared[0] < min(cleared[1:])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it is about Linux's C library")
def test_what_is_freed_is_returned_where_nobody_has_decided() -> None:
    """Measured by what a process holds after a block of 20 MB was freed below one that lives on."""
    script = """
import torch
from pathlib import Path
from compressor.cli.malloc import return_freed_memory
def resident():
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) // 1024
print(return_freed_memory())
for turn in range(3):  # by default the first block that is freed makes the next ones stay
    before = resident()
    block, above = torch.ones(5_000_000), torch.ones(5_000)
    during = resident()
    del block
    after = resident()
print(during - before, during - after)
"""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=plain, check=True)
    told, grown, returned = done.stdout.split()
    if told == "False":
        pytest.skip("the C library is not glibc")
    assert int(grown) >= 19
    assert int(returned) >= 19
