"""The record: everything a packed file can say about one tensor, and the one decoder.

    w = values[book[g], index] * scale[g] + offset[g]

float32, multiply then add, each rounded once, then cast to the tensor's dtype. ``g`` is the entry's
group: the whole tensor, one slice of an axis, or a block of consecutive entries in C order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compressor.formats.codecs.bitpacking import take
from compressor.formats.dtypes import round_to

if TYPE_CHECKING:
    from compressor.formats.codecs.base import Codec

__all__ = ["Codebook", "Content", "Grid", "RawTensor", "SharedTensor", "Table", "decode", "index_dtype"]

Floats = NDArray[np.float32]
Indices = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, eq=False)
class Table:
    """A codebook whose values are stored one by one.

    Args:
        values: float32[B, K, d]: B books (1, or one per group), K codewords each, vectors of length d
            (1 for scalars). Representable in ``dtype``, ascending by first component within a book.
        dtype: how the values are stored: F32, F16 or BF16.
        mirrored: codewords K..2K-1 are the negatives of 0..K-1 (signed hashing).

    Example:
        >>> Table.of([0.5, -1.0, 0.25]).values.ravel().tolist()
        [-1.0, 0.25, 0.5]
    """

    values: Floats
    dtype: str = "F32"
    mirrored: bool = False

    @classmethod
    def of(cls, values: object, dtype: str = "F32", mirrored: bool = False) -> Table:
        """Round scalar values to ``dtype`` and sort them: the canonical form."""
        rounded = round_to(np.asarray(values, np.float32), dtype) + np.float32(0)  # -0.0 becomes 0.0
        return cls(np.sort(rounded).reshape(1, -1, 1), dtype, mirrored)

    @property
    def shape(self) -> tuple[int, int, int]:
        """B, K, d with mirrored codewords counted in K."""
        books, codewords, length = self.values.shape
        return books, codewords * (2 if self.mirrored else 1), length

    def expand(self) -> Floats:
        """Give all codewords, float32[B, K, d], mirrored ones included."""
        return np.concatenate([self.values, -self.values], axis=1) if self.mirrored else self.values


@dataclass(frozen=True)
class Grid:
    """A codebook of evenly spaced values, stored as three numbers.

    Codeword k is ``start + k * step`` in float64, rounded once to float32.

    Example:
        >>> Grid(start=-1.0, step=0.5, count=4).expand().ravel().tolist()
        [-1.0, -0.5, 0.0, 0.5]
    """

    start: float
    step: float
    count: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """One book of ``count`` scalars."""
        return 1, self.count, 1

    def expand(self) -> Floats:
        """Give all codewords, float32[1, count, 1]."""
        values = self.start + np.arange(self.count, dtype=np.float64) * self.step
        return values.astype(np.float32).reshape(1, -1, 1)


Codebook = Table | Grid


@dataclass(frozen=True, eq=False)
class SharedTensor:
    """One tensor whose entries share the values of a codebook.

    Args:
        shape: shape of the tensor.
        dtype: its dtype: F32, F16 or BF16.
        book: position of its codebook in ``Content.books``.
        indices: uint[n], one per entry in C order, or one per vector (see ``vector_axis``).
        axis: groups are the slices of this axis; or
        block: groups are runs of this many entries; neither: one group.
        scale, offset: float32[groups] or None, stored as ``scale_dtype``.
        vector_axis: with vectors of length d, the axis they lie along: entries are read with this axis
            last, cut into vectors of d; the last vector of each row is cut short where d does not divide it.
        codec: the codec that must be used, where the scheme generates the indices; None: the writer chooses.
    """

    shape: tuple[int, ...]
    book: int
    indices: Indices
    dtype: str = "F32"
    axis: int | None = None
    block: int | None = None
    scale: Floats | None = None
    offset: Floats | None = None
    scale_dtype: str = "F32"
    vector_axis: int = 0
    codec: Codec | None = None

    @property
    def groups(self) -> int:
        """Number of groups."""
        return group_count(self.shape, self.axis, self.block)


@dataclass(frozen=True, eq=False)
class RawTensor:
    """An untouched tensor as its little-endian bytes; ``stored`` names the dtype in the file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes
    stored: str = ""


@dataclass(frozen=True, eq=False)
class Content:
    """Everything one packed file holds, before coding. ``provenance`` is apart from the content proper."""

    sites: Mapping[str, SharedTensor]
    books: tuple[Codebook, ...]
    untouched: Mapping[str, RawTensor] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    model: Mapping[str, Any] | None = None
    preprocessing: Mapping[str, Any] | None = None
    recipe: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)


def group_count(shape: tuple[int, ...], axis: int | None, block: int | None) -> int:
    """Count the groups of a tensor.

    >>> group_count((4, 3), axis=0, block=None), group_count((4, 3), None, 5), group_count((4, 3), None, None)
    (4, 3, 1)
    """
    if axis is not None:
        return shape[axis]
    return -(-math.prod(shape) // block) if block is not None else 1


def index_count(shape: tuple[int, ...], length: int, vector_axis: int) -> int:
    """Count the indices of a tensor: one per entry, or one per vector of ``length``.

    >>> index_count((4, 10), 1, 0), index_count((4, 10), 4, 1)
    (40, 12)
    """
    if length == 1 or not math.prod(shape):
        return math.prod(shape)
    along = shape[vector_axis]
    return math.prod(shape) // along * -(-along // length)


def index_dtype(count: int) -> type[np.unsignedinteger[Any]]:
    """Give the smallest unsigned dtype that holds indices below ``count``."""
    return np.uint8 if count <= 1 << 8 else np.uint16 if count <= 1 << 16 else np.uint32


def decode(site: SharedTensor, book: Codebook) -> NDArray[Any]:
    """Expand a shared tensor to its weights: the one decoder of all schemes.

    Returns:
        float32 or float16 array of ``site.shape``; BF16 as uint16 bit patterns.

    Example:
        >>> site = SharedTensor((2, 2), book=0, indices=np.array([0, 1, 1, 0], np.uint8))
        >>> decode(site, Table.of([-1.0, 2.0])).tolist()
        [[-1.0, 2.0], [2.0, -1.0]]
    """
    table = book.expand()
    weights = _vectors(site, table) if table.shape[2] > 1 else _scalars(site, table)
    return finish_decode(weights, site)


def finish_decode(weights: Floats, site: SharedTensor) -> NDArray[Any]:
    """Apply scale, then offset, and cast: all that follows the lookup. What is too large becomes infinite."""
    weights = weights.reshape(site.shape)
    with np.errstate(over="ignore", under="ignore"):
        if site.scale is not None:
            weights = weights * _spread(site.scale, site)
        if site.offset is not None:
            weights = weights + _spread(site.offset, site)
        return round_to(weights, site.dtype, cast=True)


def _scalars(site: SharedTensor, table: Floats) -> Floats:
    books, codewords, _ = table.shape
    if books == 1:
        return take(table.reshape(-1), site.indices)
    group = np.arange(books, dtype=np.int64)
    first = np.broadcast_to(_spread(group * codewords, site), site.shape).reshape(-1)
    return table.reshape(-1).take(first + site.indices)


def _vectors(site: SharedTensor, table: Floats) -> Floats:
    books, codewords, length = table.shape
    moved = _moved(site)
    along = moved[-1] if moved else 1
    per_row = -(-along // length)
    indices = site.indices.reshape(-1, per_row)
    if books > 1:  # groups are slices of an axis other than the vectors' own, checked by the reader
        group = np.broadcast_to(_spread(np.arange(books, dtype=np.int64), site), site.shape)
        rows = np.moveaxis(group, site.vector_axis, -1).reshape(-1, along)[:, :1]
        indices = indices + rows * codewords
    rows_of_values = table.reshape(-1, length)[indices].reshape(-1, per_row * length)[:, :along]
    return np.ascontiguousarray(np.moveaxis(rows_of_values.reshape(moved), -1, site.vector_axis))


def _moved(site: SharedTensor) -> tuple[int, ...]:
    shape = list(site.shape)
    return (*shape[: site.vector_axis], *shape[site.vector_axis + 1 :], shape[site.vector_axis])


def _spread(per_group: NDArray[Any], site: SharedTensor) -> NDArray[Any]:
    """Lay one value per group over the tensor, by broadcasting where the groups allow it."""
    if site.axis is not None:
        return per_group.reshape([-1 if axis == site.axis else 1 for axis in range(len(site.shape))])
    if site.block is not None:
        return np.repeat(per_group, site.block)[: math.prod(site.shape)].reshape(site.shape)
    return per_group.reshape((1,) * len(site.shape))
