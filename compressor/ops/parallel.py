"""Machine code on slices of the weights in parallel, in the threads that PyTorch's own operators run in.

Further threads would have to wait: PyTorch's spin for a while after each operator and occupy the cores. So the work is
handed to them, on Linux, by the same entry of the OpenMP library that PyTorch calls; elsewhere slices are processed one
after the other. As after PyTorch's operators, a child process forked from one that used several threads has to use one:
the other threads do not exist in it.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from compressor.formats.jit.cache import ARGUMENTS, compiled_kernel

if TYPE_CHECKING:
    from compressor.formats.jit.builder import Code, MachineCode

__all__ = ["CHUNK", "Argument", "Sliced", "cache_chunks", "on_processor", "parallel_for", "thread_slices"]

CHUNK = 1 << 15  # weights processed at a time, so that temporaries stay in the processor's caches
CHUNK_ELSEWHERE = 1 << 20  # on other devices, where launching an operator costs more than its work on fewer weights
LEAST_WEIGHTS_A_THREAD = 1 << 15  # weights worth a thread, which takes 20 microseconds to start


class Sliced(NamedTuple):
    """A contiguous tensor with an item for each weight: each slice gets the address of its first item."""

    tensor: Tensor


Argument = Tensor | Sliced | Sequence[int]
"""The same tensor for all slices; a tensor that is sliced; a number for each slice."""


def thread_slices(count: int) -> list[slice]:
    """Returns slices of so many weights, one for each thread, or fewer where they would be small.

    Example:
        >>> thread_slices(5)
        [slice(0, 5, None)]
    """
    threads = min(torch.get_num_threads(), count // LEAST_WEIGHTS_A_THREAD)
    if threads < 2:
        return [slice(0, count)]
    cuts = [count * number // threads // 64 * 64 for number in range(threads)]  # two share a cache line at most
    return [slice(start, end) for start, end in itertools.pairwise([*cuts, count])]


def cache_chunks(weights: Tensor) -> Iterator[slice]:
    """Returns slices of a tensor of one dimension that are small enough for caches; none is longer than the first."""
    length = CHUNK if weights.device.type == "cpu" else CHUNK_ELSEWHERE
    return (slice(start, start + length) for start in range(0, weights.numel(), length))


def on_processor(numbers: Tensor) -> bool:
    """Whether machine code can read these numbers: float32, in the memory of the processor."""
    return numbers.dtype == torch.float32 and numbers.device.type == "cpu"


def parallel_for(function: MachineCode, slices: Sequence[slice], arguments: Sequence[Argument]) -> list[int]:
    """Calls a function for each slice of the weights, in parallel, and returns its results.

    Args:
        function: what to call; its last argument is the number of weights.
        slices: as ``thread_slices`` returns them.
        arguments: those before the last; tensors, contiguous and in the processor's memory, are passed by their
            addresses. No two slices may write to the same place.
    """
    columns = [_column(argument, slices) for argument in arguments]
    columns.append([part.stop - part.start for part in slices])
    calls = list(zip(*columns, strict=True))
    openmp = _openmp() if len(calls) > 1 else None
    if openmp is None:
        return [function(*call) for call in calls]
    numbers = [*openmp.queries, function.address, len(calls)]
    head, width = len(numbers), ARGUMENTS + 1
    function.expect(len(columns))
    padding = [0] * (width - len(columns))  # its last number becomes the result
    for call in calls:
        numbers += call
        numbers += padding
    table = (ctypes.c_int64 * len(numbers))(*numbers)
    openmp.start(openmp.worker, ctypes.addressof(table), len(calls), 0)
    return table[head + width - 1 :: width]


def _column(argument: Argument, slices: Sequence[slice]) -> Sequence[int]:
    """Returns one argument of all calls, as numbers."""
    if isinstance(argument, Sliced):
        start, size = argument.tensor.data_ptr(), argument.tensor.element_size()
        return [start + part.start * size for part in slices]
    return [argument.data_ptr()] * len(slices) if isinstance(argument, Tensor) else argument


@dataclass(frozen=True)
class _OpenMP:
    start: Callable[[int, int, int, int], None]  # of the address every thread calls, its argument, threads, flags
    queries: list[int]  # addresses of the functions that return a thread's number, and the number of threads
    worker: int  # the address every thread calls
    code: MachineCode  # the memory behind ``worker``


@functools.cache
def _openmp() -> _OpenMP | None:
    """Finds the OpenMP library that PyTorch calls: one loaded before it (``LD_PRELOAD``), or that it was linked with.

    A second OpenMP library would start threads of its own, which wait for PyTorch's.
    """
    if sys.platform != "linux":  # the entry has another name there, or is untested
        return None
    for path in (None, torch._C.__file__):  # the symbols of the whole process; those of PyTorch and what it links to
        library = ctypes.CDLL(path)
        if hasattr(library, "GOMP_parallel"):
            break
    else:
        return None
    start, queries = library.GOMP_parallel, (library.omp_get_thread_num, library.omp_get_num_threads)
    start.argtypes, start.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    code = compiled_kernel(_write_worker, ARGUMENTS + 1)
    assert code is not None
    addresses = [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in queries]
    return _OpenMP(start, addresses, code.address, code)


def _write_worker(code: Code, width: int) -> None:
    """Builds what every thread runs: calls n, n + t, n + 2 t... for thread n of t, by the table of ``parallel_for``."""
    table, head = code.array(0, 64), 4
    number, threads = (code.call(table[place]) & 0xFFFFFFFF for place in range(2))  # the functions return 32 bits
    call = code.variable(number)
    with code.loop(lambda: call.get() < table[3]):
        first = call.get() * width + head
        table[first + (width - 1)] = code.call(table[2], *(table[first + place] for place in range(width - 1)))
        call.set(call.get() + threads)
    code.give(0)
