"""Dtypes by their safetensors names, for numpy, which has no bfloat16."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressor.formats.errors import UnsupportedError

__all__ = ["FLOATS", "ITEM_SIZES", "check_byte_order", "from_storage", "round_to", "to_storage"]

ITEM_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
FLOATS = ("F32", "F16", "BF16")


def check_byte_order() -> None:
    """Raise UnsupportedError on a big-endian machine: torch's bytes and the kernels' words would be the wrong way."""
    if sys.byteorder != "little":
        raise UnsupportedError(f"packed files need a little-endian machine, this one is {sys.byteorder}-endian")


def _bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest, ties to even, by adding half of the dropped part; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype(np.uint16)


def _from_bfloat16_bits(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_to(values: NDArray[np.float32], dtype: str, cast: bool = False) -> NDArray[Any]:
    """Round float32 values to the nearest of ``dtype``; kept as float32 unless ``cast``.

    With ``cast`` the array has the dtype itself, BF16 as uint16 bit patterns.

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
    """Give little-endian bytes of float32 values stored as ``dtype``."""
    cast = round_to(values, dtype, cast=True)
    return np.ascontiguousarray(cast).astype(cast.dtype.newbyteorder("<"), copy=False).tobytes()


def from_storage(data: bytes | memoryview, dtype: str) -> NDArray[np.float32]:
    """Read little-endian ``dtype`` bytes as float32[n]."""
    if dtype == "F32":
        return np.frombuffer(data, "<f4").astype(np.float32)
    if dtype == "F16":
        return np.frombuffer(data, "<f2").astype(np.float32)
    return _from_bfloat16_bits(np.frombuffer(data, "<u2").astype(np.uint16))
