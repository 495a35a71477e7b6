"""Machine code for what ``native`` can spell, compiled once a process; None where llvmlite is missing."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["ARGUMENTS", "compiled"]

ARGUMENTS = 10
"""How many numbers and addresses every function takes; those not given are 0."""

_lock = threading.Lock()


def compiled(write: Callable[..., Any], item: int) -> Callable[..., int] | None:
    """Compile what ``write(code, item=item)`` writes.

    Args:
        write: a function of a module, which is what the code is remembered by.
        item: bits of the items it handles.
    """
    with _lock:
        return _compile(write, item)


@functools.cache
def _compile(write: Callable[..., Any], item: int) -> Callable[..., int] | None:
    try:
        from compressor.formats.native import compile_function
    except ImportError:
        return None
    return compile_function(functools.partial(write, item=item), ARGUMENTS)
