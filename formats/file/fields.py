"""Single JSON values of the metadata: each is given back checked, or refused by name."""

from __future__ import annotations

import math
from typing import Any

from compressor.formats.dtypes import FLOATS
from compressor.formats.errors import FormatError

__all__ = ["float_dtype", "parse_name", "parse_shape", "whole"]

MAX_DIM = (1 << 31) - 1
MAX_NAME = 512


def parse_name(name: Any) -> str:
    """Give the name back where a tensor may have it: printable, no spaces, not reserved."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        raise FormatError(f"tensor name {ascii(name)[:80]}, expected 1 to {MAX_NAME} characters")
    if name == "__metadata__" or " " in name or not name.isprintable():
        raise FormatError(f"tensor name {ascii(name)[:80]}, expected no spaces, no control characters, not reserved")
    return name


def whole(value: Any, what: str, low: int, high: int) -> int:
    """Give a JSON value back where it is a whole number from low to high."""
    if type(value) is not int or not low <= value <= high:
        raise FormatError(f"{what} is {ascii(value)[:80]}, expected a whole number from {low} to {high}")
    return value


def float_dtype(value: Any, what: str) -> str:
    """Give a JSON value back where it names a float dtype."""
    if not isinstance(value, str) or value not in FLOATS:
        raise FormatError(f"{what} is {ascii(value)[:80]}, expected {', '.join(FLOATS)}")
    return value


def parse_shape(value: Any, what: str) -> tuple[int, ...]:
    """Give a JSON list of sizes as a shape, its bounds checked."""
    if not isinstance(value, list) or len(value) > 8:
        raise FormatError(f"shape of {what} is {ascii(value)[:80]}, expected a list of at most 8 sizes")
    shape = tuple(whole(size, f"a size in the shape of {what}", 0, MAX_DIM) for size in value)
    if math.prod(shape) >= 1 << 63:
        raise FormatError(f"shape of {what} is {list(shape)}: more than 2**63 entries")
    return shape
