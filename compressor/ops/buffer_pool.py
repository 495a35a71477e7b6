"""Memory for weights and gradients that is used again in the next step.

PyTorch asks the C library for new memory in each step. The C library has often given it back to the system by then, and
the system clears each page when it is first written to. For the weights of resnet34 that took longer than computing
them: a seventh of a dense step on small images.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

__all__ = ["SMALLEST", "BufferPool", "active_pool"]

SMALLEST = 1 << 16
"""Bytes below which memory is not pooled: the C library keeps small blocks itself."""

_active: ContextVar[BufferPool] = ContextVar("active buffer pool")


class BufferPool:
    """The memory that one model's weights and gradients take in turns.

    A copy of a pool, as part of a model's deep copy, is a new and empty one. Threads may share a pool.

    Example:
        >>> pool, cpu = BufferPool(), torch.device("cpu")
        >>> first = pool.empty((1 << 20,), torch.float32, cpu)
        >>> address = first.data_ptr()
        >>> del first
        >>> pool.empty((1 << 10, 1 << 10), torch.float32, cpu).data_ptr() == address
        True
    """

    def __init__(self) -> None:
        self._free: dict[tuple[int, torch.dtype], list[Tensor]] = {}

    def __reduce__(self) -> tuple[type[BufferPool], tuple[()]]:
        return BufferPool, ()

    @property
    def free_bytes(self) -> int:
        """Bytes that wait to be used again."""
        return sum(buffer.nbytes for buffers in list(self._free.values()) for buffer in list(buffers))

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns ``torch.empty(shape)``, contiguous; once no tensor shares its memory, the pool has it back.

        Memory of other devices than the processor, below ``SMALLEST`` bytes, and of bfloat16, which numpy does not
        know, is PyTorch's own.
        """
        count = torch.Size(shape).numel()
        if device.type != "cpu" or count * dtype.itemsize < SMALLEST or dtype == torch.bfloat16:
            return torch.empty(shape, dtype=dtype, device=device)
        free = self._free.setdefault((count, dtype), [])
        try:
            buffer = free.pop()
        except IndexError:  # asking for the length first would not do: another thread may take the last one
            buffer = torch.empty(count, dtype=dtype, device=device)
        # Each use has a numpy array of its own, which is gone when all tensors that share its memory are, those that
        # autograd has saved among them.
        array = buffer.numpy()
        weakref.finalize(array, _put_back, weakref.ref(self), free, buffer).atexit = False
        return torch.from_numpy(array).view(shape)

    def release(self) -> None:
        """Frees the memory that is not in use; the rest is freed when it is no longer used."""
        self._free = {}

    @contextmanager
    def activate(self) -> Iterator[None]:
        """Makes this the pool that ``active_pool`` returns, inside and in this thread."""
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)

    def _keeps(self, free: list[Tensor], buffer: Tensor) -> bool:
        """Whether nothing was released since the list was the pool's."""
        return self._free.get((buffer.numel(), buffer.dtype)) is free


def _put_back(pool: weakref.ref[BufferPool], free: list[Tensor], buffer: Tensor) -> None:
    owner = pool()
    if owner is not None and owner._keeps(free, buffer):
        free.append(buffer)


def active_pool() -> BufferPool:
    """Returns the pool of the model whose weights this thread computes; outside of one, a new pool for this use alone.

    Example:
        >>> pool = BufferPool()
        >>> with pool.activate():
        ...     active_pool() is pool
        True
    """
    return _active.get(None) or BufferPool()
