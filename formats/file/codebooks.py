"""Codebooks in the metadata and in the data of a file, and the checks of their canonical form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from compressor.formats.content import Codebook, Grid, Table
from compressor.formats.dtypes import ITEM_SIZES, from_storage
from compressor.formats.errors import FormatError
from compressor.formats.file.fields import MAX_DIM, parse_float_dtype, parse_int

__all__ = ["TableEntry", "book_fields", "check_book", "parse_book", "read_table"]

MAX_GRID = 1 << 16  # codewords of a grid


@dataclass(frozen=True)
class TableEntry:
    """A table as the metadata describes it.

    Args:
        dtype: the dtype its values are stored in: F32, F16 or BF16.
        stored: the sizes B, K, d of the stored values.
        mirrored: whether the negatives of its K codewords are codewords too.
    """

    dtype: str
    stored: tuple[int, int, int]
    mirrored: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """The sizes B, K, d; K counts mirrored codewords."""
        books, codewords, length = self.stored
        return books, codewords * (2 if self.mirrored else 1), length

    @property
    def size(self) -> int:
        """The size of its values in the file, in bytes."""
        return math.prod(self.stored) * ITEM_SIZES[self.dtype]


def parse_book(entry: Any, number: int, version: int) -> TableEntry | Grid:
    """Parses one entry of ``books``.

    Args:
        entry: a JSON value.
        number: its position in ``books``, for messages.
        version: of the format.

    Raises:
        FormatError: anything that SPEC.md does not allow.
    """
    what = f"codebook {number}"
    if not isinstance(entry, list) or len(entry) < 2:
        raise FormatError(f'{what} is {ascii(entry)[:80]}, expected [dtype, K] or ["grid", start, step, count]')
    if entry[0] == "grid":
        return _grid(entry, what)
    if entry[0] == "steps" and version > 1:
        return _steps(entry, what)
    dtype = parse_float_dtype(entry[0], f"dtype of {what}")
    if entry[2:] not in ([], ["mirrored"]):
        raise FormatError(f'{what}: {ascii(entry[2:])[:80]} after the shape, expected nothing or "mirrored"')
    sizes = entry[1] if isinstance(entry[1], list) else [1, entry[1], 1]
    if len(sizes) != 3 or (sizes is entry[1] and sizes[::2] == [1, 1]):
        raise FormatError(f"{what}: shape {ascii(sizes)[:80]}, expected [B, K, d], or K alone for B = d = 1")
    books, codewords, length = (parse_int(size, f"a size of {what}", 1, MAX_DIM) for size in sizes)
    return TableEntry(dtype, (books, codewords, length), bool(entry[2:]))


def _grid(entry: list[Any], what: str) -> Grid:
    if len(entry) != 4 or any(type(value) not in (int, float) for value in entry[1:3]):
        raise FormatError(f'{what} is {ascii(entry)[:80]}, expected ["grid", start, step, count]')
    count = parse_int(entry[3], f"count of {what}", 1, MAX_GRID)
    try:
        start, step = float(entry[1]), float(entry[2])
    except OverflowError as error:
        raise FormatError(f"{what}: values are not finite in float32") from error
    grid = Grid(start, step, count)
    check_book(grid, what)
    return grid


def _steps(entry: list[Any], what: str) -> Grid:
    """Returns a grid that begins at a whole number of its steps, and whose step is a float32."""
    if len(entry) != 4 or type(entry[2]) is not float:
        raise FormatError(f'{what} is {ascii(entry)[:80]}, expected ["steps", least, step, count]')
    least = parse_int(entry[1], f"least number of steps of {what}", -MAX_DIM, MAX_DIM)
    count = parse_int(entry[3], f"count of {what}", 1, MAX_GRID)
    step = _float32(entry[2])
    if _shortest(step) != entry[2]:
        raise FormatError(f"{what}: step {entry[2]!r}, expected the fewest digits of a float32")
    grid = Grid(least * step, step, count)
    check_book(grid, what)
    return grid


def _float32(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def _shortest(step: float) -> float:
    """Returns the number of the fewest decimal digits that rounds to the same float32."""
    return float(str(np.float32(step)))


def book_fields(book: Codebook) -> list[Any]:
    """Returns the entry of a codebook in ``books``; the inverse of ``parse_book``.

    >>> book_fields(Table.of([1.0, 2.0], "F16")), book_fields(Grid(-1.0, 0.5, 4)), book_fields(Grid(0.1, 0.5, 4))
    (['F16', 2], ['steps', -2, 0.5, 4], ['grid', 0.1, 0.5, 4])
    """
    if isinstance(book, Grid):
        least = round(max(-MAX_DIM, min(MAX_DIM, book.start / book.step))) if book.step else 0
        if book.step and _float32(book.step) == book.step and least * book.step == book.start:
            return ["steps", least, _shortest(book.step), book.count]
        return ["grid", float(book.start), float(book.step), book.count]
    books, codewords, length = book.values.shape
    shape = codewords if books == length == 1 else [books, codewords, length]
    return [book.dtype, shape, *(["mirrored"] if book.mirrored else [])]


def read_table(data: memoryview, entry: TableEntry, what: str, ascending: bool) -> Table:
    """Returns the table that is stored as bytes.

    Args:
        data: B * K * d values of the entry's dtype, little-endian.
        entry: its entry in the metadata.
        what: what messages call it.
        ascending: whether its codewords must ascend.

    Raises:
        FormatError: a value is not finite, or codewords do not ascend though they must.
    """
    table = Table(from_storage(data, entry.dtype).reshape(entry.stored), entry.dtype, entry.mirrored)
    check_book(table, what, ascending)
    return table


def check_book(book: Codebook, what: str, ascending: bool = True) -> None:
    """Checks that all codewords are finite in float32 and ascend by their first component.

    Args:
        book: the codebook.
        what: what messages call it.
        ascending: False for tables in any order, whose indices a codec generates.

    Raises:
        FormatError: they are or do not, or the step of a grid is not positive.
    """
    if isinstance(book, Grid):
        last = book.start + (book.count - 1) * book.step
        if not max(abs(book.start), abs(book.step), abs(last)) <= float(np.finfo(np.float32).max):
            raise FormatError(f"{what}: values are not finite in float32")
        if book.step < 0 or book.step == 0 < book.count - 1:
            raise FormatError(f"{what}: step {book.step}, expected above 0")
        return
    finite = np.isfinite(book.values)
    if not finite.all():
        raise FormatError(f"{what}: codeword {np.argwhere(~finite)[0, 1]} is not finite")
    if ascending and (book.values[:, 1:, 0] < book.values[:, :-1, 0]).any():
        raise FormatError(f"{what}: codewords do not ascend, expected them sorted")
