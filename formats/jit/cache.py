"""Compiled kernels, each compiled once in a process; there are none where llvmlite is not installed."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressor.formats.jit.builder import MachineCode

__all__ = ["ARGUMENTS", "available", "compiled_kernel"]

ARGUMENTS = 11
"""The most arguments that a kernel may have; every compiled function takes this many."""

_lock = threading.Lock()


@functools.cache
def available() -> bool:
    """Returns whether kernels can be compiled: llvmlite is installed."""
    try:
        import compressor.formats.jit.builder  # noqa: F401
    except ImportError:
        return False
    return True


def compiled_kernel(write: Callable[..., Any], *constants: int, vectorise: bool = False) -> MachineCode | None:
    """Returns a compiled kernel, which is compiled at the first call with these arguments.

    Args:
        write: the function of a module that writes the kernel, called as ``write(code, *constants)``.
        constants: integers that the machine code is specialised for, such as the bits of an array's items.
        vectorise: as for ``compile_function``; False by default.

    Returns:
        The kernel; None where llvmlite is not installed.

    >>> from compressor.formats.jit.builder import Code
    >>> def write_product(code: Code, factor: int) -> None:
    ...     code.give(code.number(0) * factor)
    >>> kernel = compiled_kernel(write_product, 3)
    >>> kernel(7), kernel is compiled_kernel(write_product, 3)
    (21, True)
    """
    with _lock:
        return _compile(write, constants, vectorise)


@functools.cache
def _compile(write: Callable[..., Any], constants: tuple[int, ...], vectorise: bool) -> MachineCode | None:
    if not available():
        return None
    from compressor.formats.jit.builder import compile_function

    return compile_function(lambda code: write(code, *constants), ARGUMENTS, vectorise)
