"""Machine code in several threads: each part is done once, in PyTorch's own threads where it has them."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressor.formats.jit.builder import Code, compile_function
from compressor.ops import gather_scatter, parallel, relative_distance_kernel
from compressor.ops import nearest as nearest_ops
from compressor.ops.gather_scatter import straight_through, sum_by_index
from compressor.ops.parallel import Sliced, parallel_for, thread_slices
from compressor.ops.relative_distance import frozen_lookup_with_distance

COUNT = 1000
needs_openmp = pytest.mark.skipif(parallel._openmp() is None, reason="PyTorch has no OpenMP library with this entry")


def _write_marks(code: Code) -> None:
    """Mark each item with one more than it had, with the calling thread beside it; give how many there were."""
    items, asked, count, place = code.array(0, 32), code.array(1, 64), code.number(2), code.variable(0)
    thread = code.call(asked[0]) & 0xFFFFFFFF
    with code.loop(lambda: place.get() < count):
        items[place.get()] = items[place.get()] + 1 + (thread << 8)
        place.set(place.get() + 1)
    code.give(count)


marks = compile_function(_write_marks, 4)


def marked(cuts: list[slice]) -> tuple[torch.Tensor, list[int]]:
    """Returns the marks, and what the calls gave."""
    openmp = parallel._openmp()
    assert openmp is not None
    items, asked = torch.zeros(COUNT, dtype=torch.int32), torch.tensor(openmp.queries)
    given_back = parallel_for(marks, cuts, [Sliced(items), asked])
    return items, given_back


@given(st.integers(0, 10**9), st.integers(1, 300))
def test_parts_are_all_of_it_and_none_is_small(count: int, wanted: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(wanted)
    try:
        cuts = thread_slices(count)
    finally:
        torch.set_num_threads(before)
    assert len(cuts) <= wanted
    assert cuts[0].start == 0
    assert cuts[-1].stop == count
    assert all(left.stop == right.start for left, right in itertools.pairwise(cuts))
    assert len(cuts) == 1 or all(cut.stop - cut.start >= parallel.LEAST_WEIGHTS_A_THREAD - 64 for cut in cuts)


@needs_openmp
def test_parts_are_done_by_threads_of_their_own(two_threads: None) -> None:
    cuts = thread_slices(COUNT)
    items, given_back = marked(cuts)
    assert given_back == [cut.stop - cut.start for cut in cuts] == [448, 552]
    assert [set(items[cut].tolist()) for cut in cuts] == [{1}, {1 + (1 << 8)}]


@needs_openmp
@pytest.mark.parametrize("granted", [1, 2, 5])
def test_with_fewer_threads_than_parts_all_are_done(monkeypatch: pytest.MonkeyPatch, granted: int) -> None:
    """A limit on threads (``OMP_THREAD_LIMIT``) grants fewer than are asked for."""
    openmp = parallel._openmp()
    assert openmp is not None

    def start(run: int, table: int, wanted: int, flags: int) -> None:
        openmp.start(run, table, min(wanted, granted), flags)

    fewer = dataclasses.replace(openmp, start=start)
    monkeypatch.setattr(parallel, "_openmp", lambda: fewer)
    cuts = [slice(start, start + 200) for start in range(0, COUNT, 200)]
    items, given_back = marked(cuts)
    assert given_back == [200] * 5
    assert ((items & 0xFF) == 1).all()
    assert len((items >> 8).unique()) == granted


@needs_openmp
def test_without_that_entry_parts_are_done_in_turn(monkeypatch: pytest.MonkeyPatch, two_threads: None) -> None:
    items = torch.zeros(COUNT, dtype=torch.int32)
    openmp = parallel._openmp()
    assert openmp is not None
    asked = torch.tensor(openmp.queries)
    monkeypatch.setattr(parallel, "_openmp", lambda: None)
    assert parallel_for(marks, thread_slices(COUNT), [Sliced(items), asked]) == [448, 552]
    assert (items == 1).all()


@pytest.mark.parametrize("missing", ["entry", "system"])
def test_where_the_entry_is_not_known_there_is_none(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    if missing == "entry":
        monkeypatch.setattr("ctypes.CDLL", lambda path: object())
    else:
        monkeypatch.setattr("sys.platform", "darwin")
    assert parallel._openmp.__wrapped__() is None


@needs_openmp
def test_the_library_is_that_of_pytorch() -> None:
    """With another one PyTorch's threads and ours would wait for each other."""
    script = """
import os, torch
from compressor.ops import nearest as nearest_ops
from compressor.ops import gather_scatter, parallel
from compressor.ops import relative_distance_kernel
from compressor.ops import parallel
from compressor.ops.nearest import NearestCodeword
torch.set_num_threads(2)
weights, indices, values = torch.randn(1 << 20), torch.empty(1 << 20, dtype=torch.uint8), torch.empty(1 << 20)
weights.add_(1)  # PyTorch has its threads
before = len(os.listdir("/proc/self/task"))
NearestCodeword(torch.linspace(-1, 1, 16))(weights, indices, values)
print(len(os.listdir("/proc/self/task")) - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0"]


@needs_openmp
def test_two_python_threads_may_begin_at_once() -> None:
    """What one of them compiles has to stay while the other runs it."""
    script = """
import threading, torch
from compressor.ops.nearest import NearestCodeword
torch.set_num_threads(2)
weights = torch.randn(1 << 21)
made = [(torch.empty(1 << 21, dtype=torch.uint8), torch.empty(1 << 21)) for _ in range(4)]
searches = [NearestCodeword(torch.linspace(-1, 1, 16)) for _ in made]
workers = [threading.Thread(target=find, args=(weights, *own)) for find, own in zip(searches, made)]
[worker.start() for worker in workers], [worker.join() for worker in workers]
print(all(torch.equal(made[0][0], other) for other, _ in made))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr[-500:]


def test_what_a_step_does_is_done_in_parts(monkeypatch: pytest.MonkeyPatch, two_threads: None) -> None:
    met: list[int] = []

    def spy(function: Any, cuts: Any, arguments: Any) -> list[int]:
        met.append(len(cuts))
        return parallel_for(function, cuts, arguments)

    for module in (nearest_ops, gather_scatter, relative_distance_kernel):
        monkeypatch.setattr(module, "parallel_for", spy)
    master, codebook = torch.randn(2 * COUNT, requires_grad=True), torch.linspace(-1, 1, 7)
    straight_through(master, codebook.requires_grad_()).sum().backward()
    assert met == [2, 2], "hash and sums"
    indices = torch.full((2 * COUNT,), -1, dtype=torch.int8)
    weight, drawn = frozen_lookup_with_distance(
        master, codebook.detach(), indices, 0.1, torch.zeros(2, dtype=torch.float64)
    )
    assert met[2:] == [2], "codewords put in"
    (weight.sum() + drawn).backward()
    assert met[3:] == [2], "gradient and pull"


def test_sums_of_all_threads_are_added(two_threads: None) -> None:
    assert len(thread_slices(COUNT)) == 2
    assert sum_by_index(torch.ones(COUNT), torch.arange(COUNT, dtype=torch.int32) % 3, 3).tolist() == [334, 333, 333]


def test_sums_for_many_codewords_take_no_memory_for_each_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather_scatter, "parallel_for", lambda *given: pytest.fail("sums for each thread"))
    terms = torch.randn(10_000)
    indices = torch.arange(10_000, dtype=torch.int32) // 10
    torch.testing.assert_close(sum_by_index(terms, indices, 1000), terms.view(1000, 10).sum(1))
