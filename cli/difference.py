"""How two packed files differ: tensors, metadata and sizes, decoded by numpy alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressor.formats.dtypes import FLOATS, ITEM_SIZES, from_storage
from compressor.formats.file.codebooks import TableEntry
from compressor.formats.file.reader import PackedFile

__all__ = ["Difference", "Row"]

COMPARED = ("model", "preprocessing", "recipe", "aliases")
NUMPY = {
    "BOOL": "u1", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8",
    "I64": "<i8", "F64": "<f8",
}  # fmt: skip
Bits = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class Row:
    """How one tensor differs between two files A and B.

    Args:
        tensor: its name.
        weights: number of its entries; of those in A where the shapes differ.
        what: what differs: values, shape, dtype, kind (shared or untouched), stored dtype, codewords, indices,
            scale, offset, groups, codec, size; or that only one file has the tensor.
        differ: number of entries whose bits differ; None where shapes or dtypes differ.
        max_abs: the largest finite absolute difference; None where there is none.
        sqnr: signal to noise of B against A in dB; None where it is not finite.
        bytes: size in A and B, with its part of a codebook; None where the tensor is absent.
    """

    tensor: str
    weights: int
    what: tuple[str, ...]
    differ: int | None
    max_abs: float | None
    sqnr: float | None
    bytes: tuple[int | None, int | None]


@dataclass(frozen=True)
class Difference:
    """All that differs between two files A and B.

    Args:
        content: their content SHA-256.
        rows: the tensors that differ; provenance, such as an accuracy, is not compared.
        tensors: number of tensors in A or B.
        weights: number of entries that could be compared, and of those of them that differ.
        metadata: JSON texts in A and B that differ, by path; None where one is absent.
        sizes: bytes in A and B, by what they hold.
    """

    content: tuple[str, str]
    rows: tuple[Row, ...]
    tensors: int
    weights: tuple[int, int]
    metadata: Mapping[str, tuple[str | None, str | None]]
    sizes: Mapping[str, tuple[int, int]]

    @property
    def identical(self) -> bool:
        """Whether both files have the same content."""
        return self.content[0] == self.content[1]

    @classmethod
    def of(cls, a: PackedFile, b: PackedFile) -> Difference:
        """Compares two open files."""
        names = list(dict.fromkeys(name for file in (a, b) for name in file.slices))
        rows = [_compare(name, a, b) for name in names]
        comparable = [row for row in rows if row.differ is not None]
        one, two = asdict(a.sizes()), asdict(b.sizes())
        return cls(
            content=(a.content_sha256(), b.content_sha256()),
            rows=tuple(row for row in rows if row.what),
            tensors=len(names),
            weights=(sum(row.weights for row in comparable), sum(row.differ or 0 for row in comparable)),
            metadata=_metadata(a, b),
            sizes={kind: (one[kind], two[kind]) for kind in one},
        )

    def to_json(self) -> dict[str, Any]:
        """Returns everything as JSON-ready values."""
        return {"identical_content": self.identical, **asdict(self)}


@dataclass(frozen=True, eq=False)
class _Tensor:
    """A tensor of a file: the bits of its entries, its size in bytes, and the parts it consists of."""

    dtype: str
    shape: tuple[int, ...]
    bits: Bits
    size: int
    parts: Mapping[str, Any]

    @property
    def values(self) -> NDArray[np.float64] | None:
        """The entries as numbers; None for dtypes that numpy does not have."""
        if self.dtype in FLOATS:
            return from_storage(self.bits.tobytes(), self.dtype).astype(np.float64)
        return self.bits.view(NUMPY[self.dtype]).astype(np.float64) if self.dtype in NUMPY else None


def _tensor(file: PackedFile, name: str) -> _Tensor | None:
    """Decodes a tensor; returns None where the file has none of that name."""
    name = file.aliases.get(name, name)
    if name not in file.slices:
        return None
    if name not in file.untouched:
        return _site(file, *file.slices[name])
    raw, entry = file.raw(name), file.untouched[name]
    bits = np.frombuffer(raw.data, f"<u{ITEM_SIZES[raw.dtype]}")
    parts = {"shape": raw.shape, "dtype": raw.dtype, "kind": "untouched", "stored dtype": entry.stored}
    return _Tensor(raw.dtype, raw.shape, bits, entry.size, parts)


def _site(file: PackedFile, name: str, place: int | None) -> _Tensor:
    """Decodes a shared tensor, or the slice of a stack, which has its share of the bytes and of the indices."""
    shared, entry, book = file.shared(name), file.sites[name], file.book_entries[file.sites[name].book]
    users = sum(site.book == entry.book for site in file.sites.values())
    size = entry.size + (book.size // users if isinstance(book, TableEntry) else 0)
    size += entry.groups * sum(ITEM_SIZES[dtype] for dtype in (entry.scale, entry.offset) if dtype is not None)
    parts: dict[str, Any] = {
        "shape": entry.shape, "dtype": entry.dtype, "kind": "shared", "codewords": file.book(entry.book).expand(),
        "indices": shared.indices, "scale": shared.scale, "offset": shared.offset,
        "groups": (entry.axis, entry.block, entry.vector_axis), "codec": entry.codec, "size": size,
    }  # fmt: skip
    shape, weights = entry.shape, np.ascontiguousarray(file.tensor(name))
    if place is not None:
        shape, weights = shape[1:], weights[place]
        indices = shared.indices.reshape(len(entry.names), -1)[place]
        parts |= {"shape": shape, "size": size // len(entry.names), "indices": indices}
    flat = weights.reshape(-1)
    return _Tensor(entry.dtype, shape, flat.view(f"<u{flat.itemsize}"), parts["size"], parts)


def _compare(name: str, a: PackedFile, b: PackedFile) -> Row:
    """Compares one tensor; ``what`` is empty where nothing differs."""
    first, second = _tensor(a, name), _tensor(b, name)
    sizes = None if first is None else first.size, None if second is None else second.size
    if first is None or second is None:
        only = first or second
        weights = 0 if only is None else math.prod(only.shape)
        return Row(name, weights, ("only in A" if second is None else "only in B",), None, None, None, sizes)
    weights = math.prod(first.shape)
    what = [key for key in first.parts if key in second.parts and not _same(first.parts[key], second.parts[key])]
    if first.shape != second.shape or first.dtype != second.dtype:
        return Row(name, weights, tuple(what), None, None, None, sizes)
    differ = int(np.count_nonzero(first.bits != second.bits))
    if not differ:
        return Row(name, weights, tuple(what), 0, 0.0, None, sizes)
    return Row(name, weights, ("values", *what), differ, *_error(first, second), sizes)


def _same(one: Any, two: Any) -> bool:
    arrays = isinstance(one, np.ndarray) and isinstance(two, np.ndarray)
    return np.array_equal(one, two) if arrays else type(one) is type(two) and one == two


def _error(first: _Tensor, second: _Tensor) -> tuple[float | None, float | None]:
    """Returns the largest absolute difference and the SQNR."""
    old, new = first.values, second.values
    if old is None or new is None:
        return None, None
    with np.errstate(invalid="ignore", over="ignore"):  # untouched tensors may hold NaN, inf and huge float64
        noise = np.abs(new - old)
        ratio = float(np.square(old).sum()) / (float(np.square(noise).sum()) or math.inf)
    finite = noise[np.isfinite(noise)]
    sqnr = 10 * math.log10(ratio) if 0 < ratio < math.inf else None
    return float(finite.max()) if finite.size else None, sqnr


def _metadata(a: PackedFile, b: PackedFile) -> dict[str, tuple[str | None, str | None]]:
    """Returns the entries of the metadata that differ, by path."""
    one, two = (
        {path: text for key in COMPARED for path, text in _leaves(getattr(file, key) or {}, key).items()}
        for file in (a, b)
    )
    return {path: (one.get(path), two.get(path)) for path in {**one, **two} if one.get(path) != two.get(path)}


def _leaves(value: Any, path: str) -> dict[str, str]:
    """Returns the JSON text of everything that is no object and no list of objects, by path.

    >>> _leaves({"rule": [{"bits": 4}], "mean": [0, 1]}, "recipe")
    {'recipe.rule[0].bits': '4', 'recipe.mean': '[0, 1]'}
    """
    if isinstance(value, Mapping):
        children = {
            f"{path}.{json.dumps(key)[1:-1]}": child for key, child in value.items()
        }  # escaped, because the file may be hostile
    elif isinstance(value, list) and any(isinstance(child, Mapping) for child in value):
        children = {f"{path}[{number}]": child for number, child in enumerate(value)}
    else:
        return {path: json.dumps(value)}
    return {found: text for deeper, child in children.items() for found, text in _leaves(child, deeper).items()}
