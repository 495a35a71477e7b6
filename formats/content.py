"""The content of a packed file as Python objects, and the decoder that all schemes and readers share.

    w = values[book[g], index] * scale[g] + offset[g]

is computed in float32, first the product, then the sum, each rounded once, and then cast to the tensor's dtype. ``g``
is the group of the entry: the whole tensor, one slice along an axis, or a block of consecutive entries in C order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from compressor.formats.codecs.bitpacking import take
from compressor.formats.dtypes import round_to

if TYPE_CHECKING:
    from compressor.formats.codecs.base import Codec

__all__ = [
    "Codebook",
    "Content",
    "Grid",
    "RawTensor",
    "SharedTensor",
    "Stores",
    "Table",
    "decode",
    "find_slices",
    "index_dtype",
    "index_shape",
]

Floats = NDArray[np.float32]
Indices = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, eq=False)
class Table:
    """A codebook whose values are stored one by one.

    Args:
        values: float32[B, K, d]: B books (1, or one per group) of K codewords, vectors of length d (1 for scalars).
            Representable in ``dtype``, ascending by the first component within a book.
        dtype: the dtype in which the values are stored: F32, F16 or BF16.
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
        """Returns the canonical table of scalar codewords: values rounded to ``dtype``, 0.0 for -0.0, sorted.

        Args:
            values: K numbers in any order.
            dtype: F32 (default), F16 or BF16.
            mirrored: whether the negatives of the values are codewords too.
        """
        rounded = round_to(np.asarray(values, np.float32), dtype) + np.float32(0)  # -0.0 becomes 0.0
        return cls(np.sort(rounded).reshape(1, -1, 1), dtype, mirrored)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The sizes B, K, d; K counts mirrored codewords."""
        books, codewords, length = self.values.shape
        return books, codewords * (2 if self.mirrored else 1), length

    def expand(self) -> Floats:
        """Returns all codewords, float32[B, K, d], mirrored ones included."""
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
        """The sizes (1, ``count``, 1): one book of scalars."""
        return 1, self.count, 1

    def expand(self) -> Floats:
        """Returns all codewords, float32[1, count, 1]."""
        values = self.start + np.arange(self.count, dtype=np.float64) * self.step
        return values.astype(np.float32).reshape(1, -1, 1)


Codebook = Table | Grid


@dataclass(frozen=True, eq=False)
class SharedTensor:
    """A tensor whose entries are codewords of a codebook.

    Args:
        shape: the shape of the tensor.
        book: the position of its codebook in ``Content.books``.
        indices: uint[n], the codeword of each entry in C order, or of each vector (see ``vector_axis``).
        dtype: the dtype of the tensor: F32 (default), F16 or BF16.
        axis: the axis whose slices are the groups; None, the default, for other groups.
        block: the number of consecutive entries in C order that are a group; with neither ``axis`` nor ``block``, the
            tensor is one group.
        scale: float32[groups] that codewords are multiplied by, or None.
        offset: float32[groups] that is added to the products, or None.
        scale_dtype: the dtype in which ``scale`` and ``offset`` are stored: F32 (default), F16 or BF16.
        vector_axis: for codewords of length d > 1, the axis they lie along: entries are read with this axis last, and
            each row is cut into vectors of d; the last vector of a row is truncated where d does not divide the row.
        codec: the codec that generates the indices; None, the default, where they are stored and the writer chooses.
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
        """The number of groups."""
        return group_count(self.shape, self.axis, self.block)


@dataclass(frozen=True, eq=False)
class RawTensor:
    """An untouched tensor as bytes.

    Args:
        dtype: the safetensors name of its dtype.
        shape: the shape of the tensor.
        data: its items, little-endian, in C order.
        stored: the float dtype in which the file stores them; "", the default, for ``dtype``.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes
    stored: str = ""


@dataclass(frozen=True, eq=False)
class Content:
    """All that one packed file holds, before its indices are coded.

    Args:
        sites: the shared tensors by name. A name of several words is that of a stack: each word names the tensor that
            is one slice of it along axis 0, so that small tensors of one shape share codebook and index stream.
        books: the codebooks, to which sites refer by position.
        untouched: the other tensors by name.
        aliases: for each further name of a tied tensor, the name it is stored under.
        model: name and arguments of the timm model, or None.
        preprocessing: timm's settings for preparing images, or None.
        recipe: the recipe of the training run, or None.
        provenance: facts on the run, such as accuracy and versions; no part of the content hash.
    """

    sites: Mapping[str, SharedTensor]
    books: tuple[Codebook, ...]
    untouched: Mapping[str, RawTensor] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    model: Mapping[str, Any] | None = None
    preprocessing: Mapping[str, Any] | None = None
    recipe: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)


class Stores(Protocol):
    """What holds tensors by name: a content, or a packed file."""

    @property
    def sites(self) -> Mapping[str, Any]:
        """The shared tensors, and stacks of them."""

    @property
    def untouched(self) -> Mapping[str, Any]:
        """The other tensors."""


def find_slices(stores: Stores) -> dict[str, tuple[str, int | None]]:
    """Returns for the name of each stored tensor the entry that holds it, and its place if that is a stack.

    >>> site = SharedTensor((2, 3), 0, np.zeros(6, np.uint8))
    >>> find_slices(Content({"fc.weight": site, "a.bias b.bias": site}, ()))
    {'fc.weight': ('fc.weight', None), 'a.bias': ('a.bias b.bias', 0), 'b.bias': ('a.bias b.bias', 1)}
    """
    found: dict[str, tuple[str, int | None]] = {}
    for entry in (*stores.sites, *stores.untouched):
        names = entry.split(" ")
        found |= {name: (entry, place if len(names) > 1 else None) for place, name in enumerate(names)}
    return found


def group_count(shape: tuple[int, ...], axis: int | None, block: int | None) -> int:
    """Returns the number of groups of a tensor.

    Args:
        shape: the shape of the tensor.
        axis: the axis whose slices are the groups, or None.
        block: the number of consecutive entries in a group, or None; the last group may be smaller.

    >>> group_count((4, 3), axis=0, block=None), group_count((4, 3), None, 5), group_count((4, 3), None, None)
    (4, 3, 1)
    """
    if axis is not None:
        return shape[axis]
    return -(-math.prod(shape) // block) if block is not None else 1


def index_shape(shape: tuple[int, ...], length: int, vector_axis: int) -> tuple[int, ...]:
    """Returns the shape of the indices of a tensor, in the order they are stored: that of vectors is the last axis.

    Args:
        shape: the shape of the tensor.
        length: the length of a codeword; 1 for scalars.
        vector_axis: the axis that vectors lie along; not used for scalars.

    >>> index_shape((4, 10), 1, 0), index_shape((4, 10), 4, 0)
    ((4, 10), (10, 1))
    """
    if length == 1 or not math.prod(shape):
        return shape
    others = shape[:vector_axis] + shape[vector_axis + 1 :]
    return (*others, -(-shape[vector_axis] // length))


def index_dtype(count: int) -> type[np.unsignedinteger[Any]]:
    """Returns the smallest unsigned dtype, of 8, 16 or 32 bits, that holds indices below ``count``."""
    return np.uint8 if count <= 1 << 8 else np.uint16 if count <= 1 << 16 else np.uint32


def decode(site: SharedTensor, book: Codebook) -> NDArray[Any]:
    """Returns the weights of a shared tensor; the only decoder, whatever scheme trained the tensor.

    Args:
        site: the tensor, with its indices.
        book: its codebook.

    Returns:
        An array of ``site.shape``, float32 or float16; BF16 as uint16 bit patterns.

    Example:
        >>> site = SharedTensor((2, 2), book=0, indices=np.array([0, 1, 1, 0], np.uint8))
        >>> decode(site, Table.of([-1.0, 2.0])).tolist()
        [[-1.0, 2.0], [2.0, -1.0]]
    """
    table = book.expand()
    weights = _vectors(site, table) if table.shape[2] > 1 else _scalars(site, table)
    return finish_decode(weights, site)


def finish_decode(weights: Floats, site: SharedTensor) -> NDArray[Any]:
    """Returns weights from looked-up codewords: multiplies by scale, adds offset, casts to the site's dtype.

    Args:
        weights: float32[n], the codeword of each entry in C order.
        site: the tensor; its indices are not used.

    Returns:
        As ``decode``. Values beyond the range of the dtype are infinite.
    """
    weights = weights.reshape(site.shape)
    with np.errstate(over="ignore", under="ignore"):
        if site.scale is not None:
            weights = weights * _per_entry(site.scale, site)
        if site.offset is not None:
            weights = weights + _per_entry(site.offset, site)
        return round_to(weights, site.dtype, cast=True)


def _scalars(site: SharedTensor, table: Floats) -> Floats:
    """Returns float32[n], the scalar codeword of each entry."""
    books, codewords, _ = table.shape
    if books == 1:
        return take(table.reshape(-1), site.indices)
    starts = np.arange(books, dtype=np.int64) * codewords
    start = np.broadcast_to(_per_entry(starts, site), site.shape).reshape(-1)
    return table.reshape(-1).take(start + site.indices)


def _vectors(site: SharedTensor, table: Floats) -> Floats:
    """Returns the entries of vector codewords, float32 in the shape of the tensor."""
    books, codewords, length = table.shape
    moved_shape = _vector_axis_last(site)
    row_size = moved_shape[-1] if moved_shape else 1
    vectors_per_row = -(-row_size // length)
    indices = site.indices.reshape(-1, vectors_per_row)
    if books > 1:  # a row is in one group: the reader refuses groups along the vectors' axis
        group = np.broadcast_to(_per_entry(np.arange(books, dtype=np.int64), site), site.shape)
        row_group = np.moveaxis(group, site.vector_axis, -1).reshape(-1, row_size)[:, :1]
        indices = indices + row_group * codewords
    rows = table.reshape(-1, length)[indices].reshape(-1, vectors_per_row * length)[:, :row_size]
    return np.ascontiguousarray(np.moveaxis(rows.reshape(moved_shape), -1, site.vector_axis))


def _vector_axis_last(site: SharedTensor) -> tuple[int, ...]:
    shape = list(site.shape)
    return (*shape[: site.vector_axis], *shape[site.vector_axis + 1 :], shape[site.vector_axis])


def _per_entry(per_group: NDArray[Any], site: SharedTensor) -> NDArray[Any]:
    """Returns one value per group in a shape that broadcasts over the tensor; repeats them only for blocks."""
    if site.axis is not None:
        return per_group.reshape([-1 if axis == site.axis else 1 for axis in range(len(site.shape))])
    if site.block is not None:
        return np.repeat(per_group, site.block)[: math.prod(site.shape)].reshape(site.shape)
    return per_group.reshape((1,) * len(site.shape))
