"""Tensors in the metadata: shared ones (sites) and untouched ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from compressor.formats.codecs.registry import codec_class
from compressor.formats.content import Grid, group_count, index_count
from compressor.formats.dtypes import ITEM_SIZES
from compressor.formats.errors import FormatError
from compressor.formats.file.codebooks import TableEntry
from compressor.formats.file.fields import MAX_DIM, float_dtype, parse_name, parse_shape, whole

__all__ = ["RawEntry", "SiteEntry", "check_raw", "parse_raws", "parse_site"]

MAX_SIZE = (1 << 62) - 1
_OPTIONS = {"dtype", "axis", "block", "vector_axis", "scale", "offset"}


@dataclass(frozen=True)
class SiteEntry:
    """A shared tensor as the metadata tells it; ``scale`` and ``offset`` are stored dtypes or None."""

    name: str
    shape: tuple[int, ...]
    book: int
    codec: str
    size: int
    count: int
    codewords: int
    dtype: str = "F32"
    axis: int | None = None
    block: int | None = None
    vector_axis: int = 0
    scale: str | None = None
    offset: str | None = None

    @property
    def weights(self) -> int:
        """Number of entries of the tensor."""
        return math.prod(self.shape)

    @property
    def groups(self) -> int:
        """Number of groups."""
        return group_count(self.shape, self.axis, self.block)


@dataclass(frozen=True)
class RawEntry:
    """An untouched tensor as the metadata tells it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    stored: str

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * ITEM_SIZES[self.stored]


def parse_site(record: Any, books: tuple[TableEntry | Grid, ...]) -> SiteEntry:
    """Read one entry of ``sites``; raises FormatError."""
    if not isinstance(record, list) or len(record) not in (5, 6):
        raise FormatError(f"site {ascii(record)[:80]}, expected [name, shape, book, codec, bytes] and options")
    name = parse_name(record[0])
    what = f"tensor {name!r}"
    shape = parse_shape(record[1], what)
    number = whole(record[2], f"codebook of {what}", 0, len(books) - 1)
    if not isinstance(record[3], str):
        raise FormatError(f"codec of {what} is {ascii(record[3])[:80]}, expected a name")
    size = whole(record[4], f"bytes of {what}", 0, MAX_SIZE)
    options = _options(record[5] if len(record) == 6 else None, shape, what)
    _check_groups(books[number].shape, shape, options, what)
    _, codewords, length = books[number].shape
    count = index_count(shape, length, options.get("vector_axis", 0))
    _check_stream(record[3], size, count, codewords, what)
    return SiteEntry(name, shape, number, record[3], size, count, codewords, **options)


def _options(options: Any, shape: tuple[int, ...], what: str) -> dict[str, Any]:
    """Check the optional sixth field of a site."""
    if options is None:
        return {}
    if not isinstance(options, dict) or not options or {*options} - _OPTIONS:
        raise FormatError(f"options of {what} are {ascii(options)[:80]}, expected of {', '.join(sorted(_OPTIONS))}")
    for key in {"dtype", "scale", "offset"} & {*options}:
        float_dtype(options[key], f"{key} of {what}")
    for key in {"axis", "vector_axis"} & {*options}:
        whole(options[key], f"{key} of {what}", 0, len(shape) - 1)
    if "block" in options:
        whole(options["block"], f"block of {what}", 1, MAX_DIM)
    if "axis" in options and "block" in options:
        raise FormatError(f"{what} has both axis and block, expected one of them at most")
    if options.get("scale", options.get("offset")) != options.get("offset", options.get("scale")):
        raise FormatError(f"{what} stores scale and offset in two dtypes, expected one")
    return options


def _check_groups(book: tuple[int, int, int], shape: tuple[int, ...], options: dict[str, Any], what: str) -> None:
    """Check that the codebook's B and d suit the tensor."""
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
    """Check that ``size`` bytes can hold ``count`` indices, before anything of that count is made."""
    found = codec_class(codec)
    if codewords > found.max_codewords:
        raise FormatError(f"{what} has {codewords} codewords, codec {codec!r} takes at most {found.max_codewords}")
    most = found().max_count(size, codewords)
    if most is not None and count > most:
        raise FormatError(f"{what} declares {count} indices in {size} bytes, which hold at most {most}")


def parse_raws(record: Any) -> list[RawEntry]:
    """Read one entry of ``untouched``: all tensors of one dtype, shape and stored dtype; raises FormatError."""
    if not isinstance(record, list) or len(record) not in (3, 4) or not isinstance(record[2], str):
        raise FormatError(f"untouched {ascii(record)[:80]}, expected [dtype, shape, names] and stored dtype")
    names = [parse_name(name) for name in record[2].split(" ")]
    dtype = record[0]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise FormatError(f"dtype of {names[0]!r} is {ascii(dtype)[:80]}, expected {', '.join(ITEM_SIZES)}")
    stored = dtype
    if len(record) == 4:
        stored = float_dtype(record[3], f"stored dtype of {names[0]!r}")
        if stored == float_dtype(dtype, f"dtype of {names[0]!r}"):
            raise FormatError(f"stored dtype of {names[0]!r} is its own dtype, expected another")
    shape = parse_shape(record[1], f"tensor {names[0]!r}")
    return [RawEntry(name, dtype, shape, stored) for name in names]


def check_raw(data: bytes | memoryview, dtype: str, what: str) -> None:
    """Raise FormatError where bytes are no values of ``dtype``: only truth values can be wrong."""
    if dtype == "BOOL" and np.frombuffer(data, np.uint8).max(initial=0) > 1:
        raise FormatError(f"{what} holds truth values other than 0 and 1")
