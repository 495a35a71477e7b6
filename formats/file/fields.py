"""Single JSON values of the metadata, each checked by a function that returns it.

All raise FormatError, whose message contains ``what``, the description of the value.
"""

from __future__ import annotations

import math
from typing import Any

from compressor.formats.dtypes import FLOATS
from compressor.formats.errors import FormatError

__all__ = ["MAX_DIM", "parse_float_dtype", "parse_int", "parse_name", "parse_shape"]

MAX_DIM = (1 << 31) - 1
MAX_NAME = 512
MAX_DIMS = 8


def parse_name(name: Any) -> str:
    """Returns a tensor's name, after checking that it is printable, has no spaces and is not reserved."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        raise FormatError(f"tensor name {ascii(name)[:80]}, expected 1 to {MAX_NAME} characters")
    if name == "__metadata__" or " " in name or not name.isprintable():
        raise FormatError(f"tensor name {ascii(name)[:80]}, expected no spaces, no control characters, not reserved")
    return name


def parse_int(value: Any, what: str, low: int, high: int) -> int:
    """Returns an integer, after checking that it is from ``low`` to ``high``."""
    if type(value) is not int or not low <= value <= high:
        raise FormatError(f"{what} is {ascii(value)[:80]}, expected a whole number from {low} to {high}")
    return value


def parse_float_dtype(value: Any, what: str) -> str:
    """Returns the name of a dtype, after checking that it is one of ``FLOATS``."""
    if not isinstance(value, str) or value not in FLOATS:
        raise FormatError(f"{what} is {ascii(value)[:80]}, expected {', '.join(FLOATS)}")
    return value


def parse_shape(value: Any, what: str) -> tuple[int, ...]:
    """Returns a list of sizes as a shape, after checking their number, each of them and their product."""
    if not isinstance(value, list) or len(value) > MAX_DIMS:
        raise FormatError(f"shape of {what} is {ascii(value)[:80]}, expected a list of at most {MAX_DIMS} sizes")
    shape = tuple(parse_int(size, f"a size in the shape of {what}", 0, MAX_DIM) for size in value)
    if math.prod(shape) >= 1 << 63:
        raise FormatError(f"shape of {what} is {list(shape)}: more than 2**63 entries")
    return shape
