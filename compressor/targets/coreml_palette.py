"""Shared tensors as Core ML's palettes: small whole numbers, and tables of a power of two of values."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from compressor.formats.content import Codebook, SharedTensor, index_shape
from compressor.formats.dtypes import ITEM_SIZES

__all__ = ["Palette", "gains", "palette", "why_dense"]

_WIDTHS = 1, 2, 3, 4, 6, 8
"""The bits that an index of Core ML's ``constexpr_lut_to_dense`` may have."""

_OVERHEAD = 512  # bytes that the operators of a palette take


@dataclass(frozen=True, eq=False)
class Palette:
    """A tensor as Core ML stores it.

    Args:
        indices: uint8 in the shape of the tensor, less what vectors cover; of a sparse one those at ones of ``mask``.
        table: float32[..., K, d]: K codewords of length d, and before them an axis for each of the tensor's, of size 1,
            or of the number of groups along it.
        vector_axis: the axis along which vectors lie.
        mask: bool in the shape of the tensor, False where it is zero; None, the default: it is not sparse.
    """

    indices: NDArray[np.uint8]
    table: NDArray[np.float32]
    vector_axis: int = 0
    mask: NDArray[np.bool_] | None = None

    @property
    def bits(self) -> int:
        """The bits of an index."""
        return int(self.table.shape[-2]).bit_length() - 1

    @property
    def size(self) -> int:
        """The bytes of indices, mask and table."""
        mask = 0 if self.mask is None else self.mask.size
        return -(-self.indices.size * self.bits // 8) + -(-mask // 8) + self.table.nbytes

    @property
    def identity(self) -> tuple[object, ...]:
        """What is equal for two palettes that are equal bit for bit, and for no others."""
        mask = np.empty(0, bool) if self.mask is None else self.mask
        axis = self.vector_axis if self.table.shape[-1] > 1 else None
        return axis, *(
            (values.shape, hashlib.sha256(values.tobytes()).digest()) for values in (self.indices, self.table, mask)
        )


def why_dense(site: SharedTensor, book: Codebook) -> str:
    """Returns why Core ML cannot store a tensor as a palette, in some words; "" where it can. Indices are not used."""
    _, codewords, length = book.shape
    if codewords > 1 << _WIDTHS[-1]:
        return f"{codewords} codewords, Core ML takes {1 << _WIDTHS[-1]}"
    if site.dtype != "F32":
        return f"it is {site.dtype}, expected F32"
    if site.block is not None and (site.block % math.prod(site.shape[1:]) or math.prod(site.shape) % site.block):
        return f"its groups of {site.block} weights are not equally many whole rows"
    if length > 1 and site.shape[site.vector_axis] % length:
        return f"vectors of {length} do not divide its {site.shape[site.vector_axis]} rows"
    return ""


def gains(site: SharedTensor, book: Codebook) -> bool:
    """Returns whether a tensor is smaller as a palette than as floats. Indices are not used."""
    _, codewords, length = book.shape
    weights, groups = math.prod(site.shape), site.groups if _by_group(site, book) else 1
    width = _width(codewords)
    size = weights // length * width / 8 + groups * length * 4 * (1 << width)
    return size + _OVERHEAD < weights * ITEM_SIZES[site.dtype]


def palette(site: SharedTensor, book: Codebook) -> Palette:
    """Returns a float32 tensor as a palette whose decoding is equal bit for bit: scales and offsets are in its table.

    Args:
        site: a tensor for which ``why_dense`` has no reason.
        book: its codebook.

    Example:
        >>> from compressor.formats.content import Table
        >>> site = SharedTensor((2, 3), 0, np.array([0, 4, 4, 1, 0, 3], np.uint8))
        >>> found = palette(site, Table.of([-1, 0.5, 1, 2, 3]))
        >>> found.bits, found.table.shape, found.table.ravel().tolist()
        (3, (1, 1, 8, 1), [-1.0, 0.5, 1.0, 2.0, 3.0, 0.0, 0.0, 0.0])
    """
    _, codewords, length = book.shape
    indices = site.indices.reshape(index_shape(site.shape, length, site.vector_axis)).astype(np.uint8)
    if length > 1:
        indices = np.ascontiguousarray(np.moveaxis(indices, -1, site.vector_axis))
    table = _table(site, book)
    along = site.axis or 0  # blocks are of rows
    groups = [len(table) if axis == along else 1 for axis in range(len(site.shape))]
    dense = Palette(indices, _padded(table.reshape(*groups, *table.shape[1:])), site.vector_axis)
    return min(dense, _sparse(dense, codewords) or dense, key=lambda found: found.size)


def _by_group(site: SharedTensor, book: Codebook) -> bool:
    """Returns whether each group has codewords of its own."""
    return book.shape[0] > 1 or site.scale is not None or site.offset is not None


def _table(site: SharedTensor, book: Codebook) -> NDArray[np.float32]:
    """Returns the codewords of each group as the tensor has them, float32[G, K, d]; G is 1 where all have the same."""
    table = book.expand()
    with np.errstate(over="ignore", under="ignore"):
        if site.scale is not None:
            table = table * site.scale.reshape(-1, 1, 1)
        if site.offset is not None:
            table = table + site.offset.reshape(-1, 1, 1)
    return table


def _padded(table: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns a table with zeros after its codewords, so that there are as many as an index of whole bits can name."""
    codewords = table.shape[-2]
    return np.pad(table, [(0, 0)] * (table.ndim - 2) + [(0, (1 << _width(codewords)) - codewords), (0, 0)])


def _width(codewords: int) -> int:
    return next(bits for bits in _WIDTHS if 1 << bits >= codewords)


def _sparse(dense: Palette, codewords: int) -> Palette | None:
    """Returns a palette of the weights that are not zero; None for several tables, vectors, or no single zero."""
    table = dense.table.reshape(-1)[:codewords]
    zeros = np.flatnonzero(table == 0)
    if math.prod(dense.table.shape[:-2]) > 1 or dense.table.shape[-1] > 1 or len(zeros) != 1 or codewords < 2:
        return None
    mask = dense.indices != zeros[0]
    kept = dense.indices[mask]
    others = np.delete(table, zeros[0]).reshape(*dense.table.shape[:-2], -1, 1)
    return replace(dense, indices=kept - (kept > zeros[0]).astype(np.uint8), table=_padded(others), mask=mask)
