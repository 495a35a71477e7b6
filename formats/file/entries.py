"""Entries of the metadata that describe tensors: shared ones (sites) and untouched ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from compressor.formats.codecs.registry import codec_class
from compressor.formats.content import Grid, group_count, index_shape
from compressor.formats.dtypes import ITEM_SIZES, constant
from compressor.formats.errors import FormatError
from compressor.formats.file.codebooks import TableEntry
from compressor.formats.file.fields import MAX_DIM, parse_float_dtype, parse_int, parse_name, parse_shape

__all__ = ["RawEntry", "SiteEntry", "check_raw", "parse_raws", "parse_site", "shown"]

MAX_SIZE = (1 << 62) - 1  # bytes of an index stream
MAX_CODEC = 64  # characters of a codec's id
_OPTIONS = {"dtype", "axis", "block", "vector_axis", "scale", "offset"}


@dataclass(frozen=True)
class SiteEntry:
    """A shared tensor as the metadata describes it.

    Args:
        name: its name; of a stack, whose slices along axis 0 are tensors, the names of these with spaces between.
        shape: its shape.
        book: the position of its codebook.
        codec: the id of the codec of its indices.
        size: bytes of its index stream.
        index_shape: the shape of its indices.
        codewords: the number of codewords in a book, mirrored ones counted.
        dtype: its dtype: F32 (default), F16 or BF16.
        axis: the axis whose slices are its groups, or None.
        block: the number of consecutive entries in a group, or None.
        vector_axis: the axis that vectors lie along; 0 for scalars.
        scale: the dtype its scales are stored in; None without scales.
        offset: the dtype its offsets are stored in; None without offsets.
    """

    name: str
    shape: tuple[int, ...]
    book: int
    codec: str
    size: int
    index_shape: tuple[int, ...]
    codewords: int
    dtype: str = "F32"
    axis: int | None = None
    block: int | None = None
    vector_axis: int = 0
    scale: str | None = None
    offset: str | None = None

    @property
    def count(self) -> int:
        """The number of its indices."""
        return math.prod(self.index_shape)

    @property
    def names(self) -> list[str]:
        """The names of the tensors that it holds: its own, or those of the slices of a stack."""
        return self.name.split(" ")

    @property
    def weights(self) -> int:
        """The number of entries of the tensor."""
        return math.prod(self.shape)

    @property
    def groups(self) -> int:
        """The number of groups."""
        return group_count(self.shape, self.axis, self.block)


@dataclass(frozen=True)
class RawEntry:
    """An untouched tensor as the metadata describes it.

    Args:
        name: its name.
        dtype: its dtype.
        shape: its shape.
        stored: the dtype its values are stored in; ``dtype`` itself, or another float dtype.
        value: the value that all its entries have, which are then not stored; None where they are stored.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stored: str
    value: int | float | None = None

    @property
    def size(self) -> int:
        """The size of its values in the file, in bytes."""
        return 0 if self.value is not None else math.prod(self.shape) * ITEM_SIZES[self.stored]


def parse_site(entry: Any, books: tuple[TableEntry | Grid, ...], version: int) -> SiteEntry:
    """Parses one entry of ``sites``.

    Args:
        entry: a JSON value.
        books: all codebooks of the file.
        version: of the format.

    Raises:
        UnsupportedError: its codec is not installed.
        FormatError: anything else that SPEC.md does not allow.
    """
    if not isinstance(entry, list) or len(entry) not in (5, 6):
        raise FormatError(f"site {ascii(entry)[:80]}, expected [name, shape, book, codec, bytes] and options")
    names = entry[0].split(" ") if version > 1 and isinstance(entry[0], str) else [entry[0]]
    name = " ".join(map(parse_name, names))
    what = f"tensor {shown(name)!r}"
    shape = parse_shape(entry[1], what)
    if len(names) > 1 and shape[:1] != (len(names),):
        raise FormatError(f"{what}: shape {list(shape)} of a stack of {len(names)} tensors, expected so many slices")
    number = parse_int(entry[2], f"codebook of {what}", 0, len(books) - 1)
    if not isinstance(entry[3], str) or not 0 < len(entry[3]) <= MAX_CODEC or not entry[3].isprintable():
        raise FormatError(f"codec of {what} is {ascii(entry[3])[:80]}, expected a name")
    size = parse_int(entry[4], f"bytes of {what}", 0, MAX_SIZE)
    options = _options(entry[5] if len(entry) == 6 else None, shape, what)
    _check_groups(books[number].shape, shape, options, what)
    _, codewords, length = books[number].shape
    indices = index_shape(shape, length, options.get("vector_axis", 0))
    _check_stream(entry[3], size, math.prod(indices), codewords, what)
    return SiteEntry(name, shape, number, entry[3], size, indices, codewords, **options)


def _options(options: Any, shape: tuple[int, ...], what: str) -> dict[str, Any]:
    """Returns the optional sixth field of a site, checked."""
    if options is None:
        return {}
    if not isinstance(options, dict) or not options or {*options} - _OPTIONS:
        raise FormatError(f"options of {what} are {ascii(options)[:80]}, expected of {', '.join(sorted(_OPTIONS))}")
    for key in {"dtype", "scale", "offset"} & {*options}:
        parse_float_dtype(options[key], f"{key} of {what}")
    for key in {"axis", "vector_axis"} & {*options}:
        parse_int(options[key], f"{key} of {what}", 0, len(shape) - 1)
    if "block" in options:
        parse_int(options["block"], f"block of {what}", 1, MAX_DIM)
    if "axis" in options and "block" in options:
        raise FormatError(f"{what} has both axis and block, expected one of them at most")
    if options.get("scale", options.get("offset")) != options.get("offset", options.get("scale")):
        raise FormatError(f"{what} stores scale and offset in two dtypes, expected one")
    return options


def _check_groups(book: tuple[int, int, int], shape: tuple[int, ...], options: dict[str, Any], what: str) -> None:
    """Checks that B and d of a codebook [B, K, d] suit the groups and axes of a tensor."""
    books, _, length = book
    groups = group_count(shape, options.get("axis"), options.get("block"))
    if books not in (1, groups):
        raise FormatError(f"codebook of {what} has {books} books for {groups} groups, expected 1 or one per group")
    if length == 1 and "vector_axis" in options:
        raise FormatError(f"{what} has a vector_axis, but its codewords are scalars")
    if length > 1 and not math.prod(shape):
        raise FormatError(f"{what} is empty, expected scalar codewords")
    if length > 1 and not shape:
        raise FormatError(f"{what} has no axis for vectors of {length}")
    if length > 1 and books > 1 and options.get("axis") in (None, options.get("vector_axis", 0)):
        raise FormatError(f"{what} has a codebook of vectors per group, expected groups along another axis than theirs")


def _check_stream(codec: str, size: int, count: int, codewords: int, what: str) -> None:
    """Checks that ``size`` bytes can hold ``count`` indices, before an array of that length is allocated."""
    kind = codec_class(codec)
    if codewords > kind.max_codewords:
        raise FormatError(f"{what} has {codewords} codewords, codec {codec!r} takes at most {kind.max_codewords}")
    most = kind().max_count(size, codewords)
    if most is not None and count > most:
        raise FormatError(f"{what} declares {count} indices in {size} bytes, which hold at most {most}")


def shown(name: str) -> str:
    """Returns the name of a shared tensor as messages show it: of a stack the first and the last.

    >>> shown("conv.weight"), shown("bn1.bias bn2.bias bn3.bias")
    ('conv.weight', 'bn1.bias ... bn3.bias')
    """
    first, *others = name.split(" ")
    return f"{first} ... {others[-1]}" if others else first


def parse_raws(entry: Any, version: int) -> list[RawEntry]:
    """Parses one entry of ``untouched``, which lists all tensors of one dtype, shape, and stored dtype or value.

    Args:
        entry: a JSON value.
        version: of the format.

    Raises:
        FormatError: anything that SPEC.md does not allow.
    """
    if not isinstance(entry, list) or len(entry) not in (3, 4) or not isinstance(entry[2], str):
        raise FormatError(f"untouched {ascii(entry)[:80]}, expected [dtype, shape, names] and stored dtype or value")
    names = [parse_name(name) for name in entry[2].split(" ")]
    dtype = entry[0]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise FormatError(f"dtype of {names[0]!r} is {ascii(dtype)[:80]}, expected {', '.join(ITEM_SIZES)}")
    shape = parse_shape(entry[1], f"tensor {names[0]!r}")
    stored, value = dtype, None
    if len(entry) == 4 and type(entry[3]) in (int, float) and version > 1:
        value = entry[3]
        if constant(value, dtype) is None:
            raise FormatError(f"value of {names[0]!r} is {value!r}, expected one that {dtype} has")
    elif len(entry) == 4:
        stored = parse_float_dtype(entry[3], f"stored dtype of {names[0]!r}")
        if stored == parse_float_dtype(dtype, f"dtype of {names[0]!r}"):
            raise FormatError(f"stored dtype of {names[0]!r} is its own dtype, expected another")
    return [RawEntry(name, dtype, shape, stored, value) for name in names]


def check_raw(data: bytes | memoryview, dtype: str, what: str) -> None:
    """Checks that bytes are values of a dtype; of all dtypes only BOOL has invalid bytes.

    Raises:
        FormatError: a byte of a BOOL tensor is neither 0 nor 1.
    """
    if dtype == "BOOL" and np.frombuffer(data, np.uint8).max(initial=0) > 1:
        raise FormatError(f"{what} holds truth values other than 0 and 1")
