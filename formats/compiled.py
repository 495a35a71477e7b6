"""Machine code for what ``native`` can spell, compiled once a process; None where llvmlite is missing."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["ARGUMENTS", "compiled"]

ARGUMENTS = 11
"""How many numbers and addresses every function takes; those not given are 0."""

_lock = threading.Lock()


def compiled(write: Callable[..., Any], *constants: int, vectorise: bool = False) -> Callable[..., int] | None:
    """Compile what ``write(code, *constants)`` writes.

    Args:
        write: a function of a module, which is what the code is remembered by.
        constants: what the code is made for, such as the bits of the items it handles.
        vectorise: as for ``compile_function``.
    """
    with _lock:
        return _compile(write, constants, vectorise)


@functools.cache
def _compile(write: Callable[..., Any], constants: tuple[int, ...], vectorise: bool) -> Callable[..., int] | None:
    try:
        from compressor.formats.native import compile_function
    except ImportError:
        return None
    return compile_function(lambda code: write(code, *constants), ARGUMENTS, vectorise)
