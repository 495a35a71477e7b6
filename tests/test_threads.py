"""Machine code in several threads: each part is done once, in PyTorch's own threads where it has them."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressor import threads
from compressor.formats.native import Code, compile_function
from compressor.threads import Along, parts, side_by_side

COUNT = 1000
needs_openmp = pytest.mark.skipif(threads._openmp() is None, reason="PyTorch has no OpenMP library with this entry")


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
    """Give the marks, and what the calls gave."""
    openmp = threads._openmp()
    assert openmp is not None
    items, asked = torch.zeros(COUNT, dtype=torch.int32), torch.tensor(openmp.asking)
    given_back = side_by_side(marks, cuts, [Along(items), asked])
    return items, given_back


@given(st.integers(0, 10**9), st.integers(1, 300))
def test_parts_are_all_of_it_and_none_is_small(count: int, wanted: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(wanted)
    try:
        cuts = parts(count)
    finally:
        torch.set_num_threads(before)
    assert len(cuts) <= wanted
    assert cuts[0].start == 0
    assert cuts[-1].stop == count
    assert all(left.stop == right.start for left, right in itertools.pairwise(cuts))
    assert len(cuts) == 1 or all(cut.stop - cut.start >= threads.FEWEST - 64 for cut in cuts)


@needs_openmp
def test_parts_are_done_by_threads_of_their_own(two_threads: None) -> None:
    cuts = parts(COUNT)
    items, given_back = marked(cuts)
    assert given_back == [cut.stop - cut.start for cut in cuts] == [448, 552]
    assert [set(items[cut].tolist()) for cut in cuts] == [{1}, {1 + (1 << 8)}]


@needs_openmp
@pytest.mark.parametrize("granted", [1, 2, 5])
def test_with_fewer_threads_than_parts_all_are_done(monkeypatch: pytest.MonkeyPatch, granted: int) -> None:
    """A limit on threads (``OMP_THREAD_LIMIT``) grants fewer than are asked for."""
    openmp = threads._openmp()
    assert openmp is not None

    def start(run: int, table: int, wanted: int, flags: int) -> None:
        openmp.start(run, table, min(wanted, granted), flags)

    fewer = dataclasses.replace(openmp, start=start)
    monkeypatch.setattr(threads, "_openmp", lambda: fewer)
    cuts = [slice(start, start + 200) for start in range(0, COUNT, 200)]
    items, given_back = marked(cuts)
    assert given_back == [200] * 5
    assert ((items & 0xFF) == 1).all()
    assert len((items >> 8).unique()) == granted


def test_without_that_entry_parts_are_done_in_turn(monkeypatch: pytest.MonkeyPatch, two_threads: None) -> None:
    items = torch.zeros(COUNT, dtype=torch.int32)
    asked = torch.tensor((threads._openmp() or pytest.skip("nothing to ask for a thread's number")).asking)
    monkeypatch.setattr(threads, "_openmp", lambda: None)
    assert side_by_side(marks, parts(COUNT), [Along(items), asked]) == [448, 552]
    assert (items == 1).all()


def test_a_library_without_the_entry_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda path: object())
    assert threads._openmp.__wrapped__() is None
