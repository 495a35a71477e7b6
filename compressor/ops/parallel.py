"""Machine code on several weights side by side, in the threads that PyTorch's own operators run in.

Threads of our own would have to wait: PyTorch's stay busy for a while after each operator, and take the cores. So the
work is handed to them, by the entry of the OpenMP library that PyTorch calls, on Linux; elsewhere parts are done one
after the other. As after PyTorch's operators, a child process that is forked by one that used several threads must keep
to one: it has none of the others.
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

CHUNK = 1 << 15  # weights handled at a time, so that temporaries stay in cache
CHUNK_ELSEWHERE = 1 << 20  # than on a processor: there the launch of an operator costs more than what it does to fewer
LEAST_WEIGHTS_A_THREAD = 1 << 15  # weights worth a thread: it takes 20 microseconds to have it begin


class Sliced(NamedTuple):
    """A contiguous tensor with an item for each weight: each part gets the address of its own."""

    tensor: Tensor


Argument = Tensor | Sliced | Sequence[int]
"""The same for all parts; from each part's place on; one for each part."""


def thread_slices(count: int) -> list[slice]:
    """Cut so many weights into parts, one for each thread; fewer, where they would be small.

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
    """Cut a tensor of one dimension into runs, the first of them the longest."""
    block = CHUNK if weights.device.type == "cpu" else CHUNK_ELSEWHERE
    return (slice(start, start + block) for start in range(0, weights.numel(), block))


def on_processor(numbers: Tensor) -> bool:
    """Tell whether machine code can read these numbers: float32, in the memory of the processor."""
    return numbers.dtype == torch.float32 and numbers.device.type == "cpu"


def parallel_for(function: MachineCode, cuts: Sequence[slice], arguments: Sequence[Argument]) -> list[int]:
    """Call a function for each part of the weights, all at once; give what it gives.

    Args:
        function: what to call; its last argument is the number of weights.
        cuts: of ``parts``.
        arguments: those before the last; tensors, contiguous and in the processor's memory, are passed by their
            addresses. No two parts may write to the same place.
    """
    columns = [_column(argument, cuts) for argument in arguments]
    columns.append([cut.stop - cut.start for cut in cuts])
    calls = list(zip(*columns, strict=True))
    openmp = _openmp() if len(calls) > 1 else None
    if openmp is None:
        return [function(*call) for call in calls]
    numbers = [*openmp.asking, function.address, len(calls)]
    head, width = len(numbers), ARGUMENTS + 1
    function.expect(len(columns))
    rest = [0] * (width - len(columns))  # the last becomes the result
    for call in calls:
        numbers += call
        numbers += rest
    table = (ctypes.c_int64 * len(numbers))(*numbers)
    openmp.start(openmp.each, ctypes.addressof(table), len(calls), 0)
    return table[head + width - 1 :: width]


def _column(argument: Argument, cuts: Sequence[slice]) -> Sequence[int]:
    if isinstance(argument, Sliced):
        start, size = argument.tensor.data_ptr(), argument.tensor.element_size()
        return [start + cut.start * size for cut in cuts]
    return [argument.data_ptr()] * len(cuts) if isinstance(argument, Tensor) else argument


@dataclass(frozen=True)
class _OpenMP:
    start: Callable[[int, int, int, int], None]  # what each thread runs, on which table, how many; flags
    asking: list[int]  # addresses of the functions that tell a thread its number, and how many it is one of
    each: int  # address of what each thread runs
    code: MachineCode  # which lives as long as this


@functools.cache
def _openmp() -> _OpenMP | None:
    """Find the library that PyTorch calls: one loaded before it (``LD_PRELOAD``), or that it was linked with."""
    if sys.platform != "linux":  # another entry, or one that nobody has tried
        return None
    for path in (None, torch._C.__file__):  # all that any library may use; PyTorch, and what it was linked with
        library = ctypes.CDLL(path)
        if hasattr(library, "GOMP_parallel"):
            break
    else:
        return None
    start, asked = library.GOMP_parallel, (library.omp_get_thread_num, library.omp_get_num_threads)
    start.argtypes, start.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    code = compiled_kernel(_write_each, ARGUMENTS + 1)
    assert code is not None
    return _OpenMP(start, [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in asked], code.address, code)


def _write_each(code: Code, width: int) -> None:
    """Write the calls number n, n + t, n + 2 t... for thread n of t; ``side_by_side`` lays out the table."""
    table, head = code.array(0, 64), 4
    own_number, threads = (code.call(table[place]) & 0xFFFFFFFF for place in range(2))  # they give 32 bits
    call = code.variable(own_number)
    with code.loop(lambda: call.get() < table[3]):
        first = call.get() * width + head
        table[first + (width - 1)] = code.call(table[2], *(table[first + place] for place in range(width - 1)))
        call.set(call.get() + threads)
    code.give(0)
