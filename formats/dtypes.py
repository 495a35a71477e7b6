"""Dtypes by their safetensors names, and conversions between float32 and the stored float dtypes.

numpy has no bfloat16: arrays of BF16 hold its bit patterns as uint16.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressor.formats.errors import UnsupportedError

__all__ = [
    "FLOATS",
    "ITEM_SIZES",
    "TORCH_NAMES",
    "check_byte_order",
    "constant",
    "constant_value",
    "from_storage",
    "round_to",
    "to_storage",
]

_DTYPES = {
    "BOOL": (1, "bool"),
    "U8": (1, "uint8"),
    "I8": (1, "int8"),
    "F8_E5M2": (1, "float8_e5m2"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "U16": (2, "uint16"),
    "I16": (2, "int16"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "U32": (4, "uint32"),
    "I32": (4, "int32"),
    "F32": (4, "float32"),
    "U64": (8, "uint64"),
    "I64": (8, "int64"),
    "F64": (8, "float64"),
}  # bytes of an item, and torch's name; ascending by size, which the report relies on

ITEM_SIZES = {name: size for name, (size, _) in _DTYPES.items()}
"""Bytes of an item of each dtype that a packed file can hold."""

TORCH_NAMES = {name: torch_name for name, (_, torch_name) in _DTYPES.items()}
"""The attribute of ``torch`` that is each dtype; strings, so that reading a file does not import torch."""

FLOATS = ("F32", "F16", "BF16")
"""The dtypes of shared tensors, codebooks, scales and offsets."""


def check_byte_order() -> None:
    """Checks that the machine is little-endian, as the format is.

    Raises:
        UnsupportedError: on a big-endian machine, where torch and the kernels would read the bytes in reverse order.
    """
    if sys.byteorder != "little":
        raise UnsupportedError(f"packed files need a little-endian machine, this one is {sys.byteorder}-endian")


def _bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounds to nearest, ties to even: adds 0x7FFF and the lowest kept bit, then drops 16 bits. NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype(np.uint16)


def _from_bfloat16_bits(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_to(values: NDArray[np.float32], dtype: str, cast: bool = False) -> NDArray[Any]:
    """Rounds values to the nearest values of a float dtype, ties to even.

    Args:
        values: float32, any shape.
        dtype: F32, F16 or BF16.
        cast: returns an array of ``dtype`` itself, BF16 as uint16 bit patterns; by default the array stays float32.

    Returns:
        An array of the shape of ``values``; values beyond the range of F16 are infinite.

    >>> round_to(np.array([1.00390625], np.float32), "BF16").tolist()
    [1.0]
    """
    if dtype == "F32":
        return values
    if dtype == "F16":
        half = values.astype(np.float16)
        return half if cast else half.astype(np.float32)
    bits = _bfloat16_bits(values)
    return bits if cast else _from_bfloat16_bits(bits)


def to_storage(values: NDArray[np.float32], dtype: str) -> bytes:
    """Returns float32 values, rounded to ``dtype`` (F32, F16 or BF16), as little-endian bytes in C order."""
    cast = round_to(values, dtype, cast=True)
    return np.ascontiguousarray(cast).astype(cast.dtype.newbyteorder("<"), copy=False).tobytes()


def from_storage(data: bytes | memoryview, dtype: str) -> NDArray[np.float32]:
    """Returns float32[n] of little-endian bytes of ``dtype`` (F32, F16 or BF16); the inverse of ``to_storage``."""
    if dtype == "F32":
        return np.frombuffer(data, "<f4").astype(np.float32)
    if dtype == "F16":
        return np.frombuffer(data, "<f2").astype(np.float32)
    return _from_bfloat16_bits(np.frombuffer(data, "<u2").astype(np.uint16))


def constant(value: int | float, dtype: str) -> bytes | None:
    r"""Returns the little-endian bytes of an item; None where the dtype has no item of exactly that value.

    Args:
        value: a float for a dtype of floats, an integer for others; 0 or 1 for BOOL.
        dtype: its name; None is returned for the dtypes of 8-bit floats.

    >>> constant(1.0, "F16"), constant(-1, "I16"), constant(-1, "U16"), constant(0.1, "F32")
    (b'\x00<', b'\xff\xff', None, None)
    """
    if dtype.startswith(("F", "BF")) != isinstance(value, float) or dtype.startswith("F8"):
        return None
    if dtype in FLOATS:
        with np.errstate(over="ignore", under="ignore"):
            item = to_storage(np.array([value], np.float64).astype(np.float32), dtype)
        return item if float(from_storage(item, dtype)[0]) == value else None
    kind = np.dtype(TORCH_NAMES[dtype])
    if dtype != "F64":
        low, high = (0, 1) if dtype == "BOOL" else (np.iinfo(kind).min, np.iinfo(kind).max)
        if not low <= value <= high:
            return None
    return np.array([value], kind.newbyteorder("<")).tobytes()


def constant_value(data: bytes, dtype: str) -> int | float | None:
    r"""Returns the value that all items have; None where they differ, there are none, or no number says it exactly.

    Args:
        data: little-endian items.
        dtype: their dtype.

    >>> constant_value(b"\x00<\x00<", "F16"), constant_value(b"\x00<\x00=", "F16")
    (1.0, None)
    """
    size = ITEM_SIZES.get(dtype, 0)
    item = data[:size]
    if not item or dtype.startswith("F8") or data[size:] != data[:-size]:
        return None
    if dtype in FLOATS:
        value: int | float = float(from_storage(item, dtype)[0])
    else:
        number = np.frombuffer(item, np.dtype(TORCH_NAMES[dtype]).newbyteorder("<"))[0].item()
        value = number if dtype == "F64" else int(number)
    return value if constant(value, dtype) == item else None
