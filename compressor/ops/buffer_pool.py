"""Memory for weights and gradients that is used again in the next step.

PyTorch asks the C library for it anew in each step, which often has given it back to the system by then; and the system
clears each page of what it gives, when it is first written to. For the weights of resnet34 that took longer than to
compute them: a seventh of a dense step on small images.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["give_back", "keep_freed", "workspace"]

LEAST = 1 << 16  # bytes; the C library keeps what is smaller
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's names for what its ``mallopt`` sets

_free: dict[tuple[int, torch.dtype], list[Tensor]] = {}


def workspace(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Give ``torch.empty(shape)``, contiguous; once that tensor is gone its memory is in the next one of its size.

    Example:
        >>> first = workspace((1 << 20,), torch.float32, torch.device("cpu"))
        >>> address = first.data_ptr()
        >>> del first
        >>> workspace((1 << 10, 1 << 10), torch.float32, torch.device("cpu")).data_ptr() == address
        True
    """
    count = torch.Size(shape).numel()
    if device.type != "cpu" or count * dtype.itemsize < LEAST or dtype == torch.bfloat16:  # numpy knows no bfloat16
        return torch.empty(shape, dtype=dtype, device=device)
    free = _free.setdefault((count, dtype), [])
    try:
        held = free.pop()
    except IndexError:  # asking first would not do: another thread may take the last
        held = torch.empty(count, dtype=dtype, device=device)
    # An array of its own for each use: it is gone when all tensors are that share its memory, autograd's among them.
    lent = held.numpy()
    weakref.finalize(lent, _take_back, free, held).atexit = False
    return torch.from_numpy(lent).view(shape)


def _take_back(free: list[Tensor], held: Tensor) -> None:
    if _free.get((held.numel(), held.dtype)) is free:  # else memory was given back in the meantime
        free.append(held)


def give_back() -> None:
    """Free what is not in use; what is, is freed when it no longer is."""
    _free.clear()


def keep_freed() -> bool:
    """Let the C library keep what is freed, until the process ends; tell whether it does: glibc, on Linux.

    For a command, whose process nobody else uses: it speeds up the steps of any training, for not only weights are made
    anew in each. Whoever sets glibc's variables ``MALLOC_...``, or ``GLIBC_TUNABLES`` for it, has decided otherwise.
    """
    decided = any(name.startswith("MALLOC_") for name in os.environ)
    if sys.platform != "linux" or decided or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    kept = library.mallopt(MMAP_THRESHOLD, 1 << 25), library.mallopt(TRIM_THRESHOLD, (1 << 31) - 1)  # the most of each
    return kept == (1, 1)
