"""Machine code for what ``native`` can spell, compiled once a process; None where llvmlite is missing."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressor.formats.jit.builder import MachineCode

__all__ = ["ARGUMENTS", "available", "compiled_kernel"]

ARGUMENTS = 11
"""How many numbers and addresses a function takes at most."""

_lock = threading.Lock()


@functools.cache
def available() -> bool:
    """Tell whether machine code can be had."""
    try:
        import compressor.formats.jit.builder  # noqa: F401
    except ImportError:
        return False
    return True


def compiled_kernel(write: Callable[..., Any], *constants: int, vectorise: bool = False) -> MachineCode | None:
    """Compile what ``write(code, *constants)`` writes.

    Args:
        write: a function of a module, which is what the code is remembered by.
        constants: what the code is made for, such as the bits of the items it handles.
        vectorise: as for ``compile_function``.
    """
    with _lock:
        return _compile(write, constants, vectorise)


@functools.cache
def _compile(write: Callable[..., Any], constants: tuple[int, ...], vectorise: bool) -> MachineCode | None:
    if not available():
        return None
    from compressor.formats.jit.builder import compile_function

    return compile_function(lambda code: write(code, *constants), ARGUMENTS, vectorise)
