"""rANS whose frequencies depend on where an index stands: on the classes of its row, its column and its position.

The weights of some rows, columns or kernel positions are larger than those of others. Tables are chosen, not adapted,
so decoding is as parallel as that of ``ans``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from compressor.formats.codecs.base import Stream
from compressor.formats.codecs.bit_text import BitReader, to_bytes
from compressor.formats.codecs.chunks import CHUNK, lanes_for, split_chunks
from compressor.formats.codecs.cost_tables import (
    CostTables,
    choose_tables,
    frequencies_of,
    read_tables,
    write_tables,
)
from compressor.formats.codecs.frequencies import FRACTION, code_lengths, decoding_table
from compressor.formats.codecs.kernels import LOW, bit_patterns, rans_decode, rans_encode
from compressor.formats.codecs.rans import RansCodec
from compressor.formats.codecs.registry import register
from compressor.formats.codecs.site_classes import Classes, choose_classes
from compressor.formats.errors import FormatError
from compressor.formats.io.huge_pages import allocate

__all__ = ["PlacedAns", "StreamReader"]

Ints = NDArray[np.int64]

_PRECISIONS = range(8, 15)  # values of P that are tried
_ENTRIES_PER_BIT = 128  # of decoding tables: larger, slower ones must save more
_CACHED_ENTRIES = 1 << 16  # of decoding tables of half a megabyte, which stay in a processor's cache


@register
@dataclass(frozen=True)
class PlacedAns(RansCodec):
    """Codes an index with the frequencies of the table whose number is the sum of three classes.

    Stores precision, lanes and number of tables; the tables of the classes of rows, columns and positions, and those
    of the indices, as costs; the number of words of each chunk but the last (u32); then the chunks as ``ans`` does, of
    which the first begins with the classes. A stream of no indices is empty.
    """

    id: ClassVar[str] = "classes"
    places: ClassVar[bool] = True
    max_codewords: ClassVar[int] = 1 << _PRECISIONS[-1]

    def encode(self, indices: NDArray[Any], stream: Stream) -> bytes:
        """Returns the indices coded with the classes, if any, and the tables that give about the fewest bytes."""
        if not stream.count:
            return b""
        chosen = choose_classes(indices, stream.axes, stream.codewords)
        models = [_Model.of(indices, chosen, stream)]
        if chosen.tables > 1:
            models.append(_Model.of(indices, Classes.none(stream.axes), stream))
        return min(models, key=lambda model: model.bits).encode(indices)

    def decode_to(self, data: memoryview, stream: Stream, values: NDArray[Any]) -> NDArray[Any]:
        """Returns the value of each index; FormatError unless tables, sizes, words and final states are all valid."""
        if not stream.count and not len(data):
            return np.empty(0, values.dtype)
        try:
            if not stream.count:
                raise FormatError(f"{len(data)} bytes for no indices, expected none")
            return StreamReader(data, stream).decode(values)
        except FormatError as error:
            raise FormatError(f"indices of {stream.name!r}: {error}") from None


@dataclass(frozen=True)
class _Part:
    """What is coded with tables of its own: the classes of one axis, or the indices.

    Args:
        counts: int64[T, K], how often each symbol occurs with each table.
        tables: the tables.
        bits: about those of tables and symbols.
    """

    counts: Ints
    tables: CostTables
    bits: int

    @classmethod
    def of(cls, counts: Ints) -> _Part:
        """Chooses the tables."""
        return cls(counts, *choose_tables(counts))

    def coded_bits(self, precision: int) -> int:
        """Returns the bits of the symbols, in units of 2**-FRACTION."""
        frequencies = self.tables.frequencies(self.counts.shape[1], precision)
        return int((self.counts * code_lengths(frequencies, precision)).sum())


@dataclass(frozen=True)
class _Model:
    """Classes, and the tables that code classes and indices.

    Args:
        classes: the class of each row, column and position.
        parts: the stored classes, then the indices.
    """

    classes: Classes
    parts: list[_Part]

    @classmethod
    def of(cls, indices: NDArray[Any], classes: Classes, stream: Stream) -> _Model:
        """Chooses the tables for given classes."""
        counts = np.zeros(classes.tables * stream.codewords, np.int64)
        for start in range(0, stream.count, CHUNK):
            codes = indices[start : start + CHUNK]
            if classes.tables > 1:
                codes = codes + classes.choices(start, start + len(codes)).astype(np.int64) * stream.codewords
            counts += np.bincount(codes, minlength=len(counts))
        axes = [np.bincount(axis, minlength=classes.tables)[None] for axis in _stored(classes)]
        return cls(classes, [_Part.of(each) for each in [*axes, counts.reshape(classes.tables, -1)]])

    @property
    def bits(self) -> int:
        """About the bits of the stream."""
        return sum(part.bits for part in self.parts)

    def encode(self, indices: NDArray[Any]) -> bytes:
        """Returns the stream."""
        precision, coded = self._precision()
        lanes = lanes_for(coded >> FRACTION + 3, len(indices))
        text = f"{precision:04b}{lanes.bit_length() - 1:03b}{self.classes.tables - 1:05b}"
        text += "".join(write_tables(part.tables, part.counts.shape[1]) for part in self.parts)
        tables = [part.tables.frequencies(part.counts.shape[1], precision) for part in self.parts]
        chunks = []
        for start in range(0, len(indices), CHUNK):
            writer = _Chunk(lanes, precision)
            chunk = indices[start : start + CHUNK]
            several = self.classes.tables > 1
            writer.put(chunk, tables[-1], self.classes.choices(start, start + len(chunk)) if several else None)
            if not start:
                for axis, table in reversed([*zip(_stored(self.classes), tables[:-1], strict=True)]):
                    writer.put(axis.astype(np.uint8), table)
            chunks.append(writer)
        sizes = np.array([len(chunk.words) // 2 for chunk in chunks[:-1]], "<u4")
        return (
            to_bytes(text)
            + sizes.tobytes()
            + b"".join(chunk.states.astype("<u4").tobytes() + chunk.words for chunk in chunks)
        )

    def _precision(self) -> tuple[int, int]:
        """Returns the precision of the fewest bits, large tables counted, and the bits in units of 2**-FRACTION."""
        most = max(part.tables.most_used(part.counts.shape[1]) for part in self.parts)
        choices = [
            (precision, sum(part.coded_bits(precision) for part in self.parts))
            for precision in _PRECISIONS
            if most <= 1 << precision
        ]
        tables = self.classes.tables

        def cost(choice: tuple[int, int]) -> tuple[bool, int]:
            entries = tables << choice[0]
            return entries > _CACHED_ENTRIES, choice[1] + (entries << FRACTION) // _ENTRIES_PER_BIT

        return min(choices, key=cost)


class _Chunk:
    """A chunk that is written from its end: what is put first is decoded last.

    Args:
        lanes: the number of states.
        precision: P.
    """

    def __init__(self, lanes: int, precision: int) -> None:
        self.states, self.words, self._precision = np.full(lanes, LOW, np.int64), b"", precision

    def put(self, symbols: NDArray[Any], frequencies: Ints, choices: NDArray[np.uint8] | None = None) -> None:
        """Codes symbols by int64[T, K] frequencies, with the table that ``choices`` gives each."""
        words = np.empty(len(symbols), np.uint16)
        starts = np.cumsum(frequencies, 1) - frequencies
        first = rans_encode(words, self.states, symbols, frequencies, starts, self._precision, choices)
        self.words = words[first:].astype("<u2").tobytes() + self.words


def _stored(classes: Classes) -> list[Ints]:
    """Returns the classes that a stream has: none where there is one table, and none of an axis of one entry."""
    return [axis for axis in classes.axes if classes.tables > 1 and len(axis) > 1]


class StreamReader:
    """Reads a stream; its methods raise FormatError where that is not valid.

    Args:
        data: the stream, not empty.
        stream: its description.

    Attributes:
        tables: the number T of tables.
        head_size: the bytes of all before the sizes of the chunks.
    """

    def __init__(self, data: memoryview, stream: Stream) -> None:
        bits = BitReader(data)
        self._precision, self._lanes, self.tables = bits.number(4), 1 << bits.number(3), bits.number(5) + 1
        if self._precision > _PRECISIONS[-1]:
            raise FormatError(f"precision {self._precision}, expected at most {_PRECISIONS[-1]}")
        self._stream = stream
        self._axes = [axis for axis, size in enumerate(stream.axes) if self.tables > 1 and size > 1]
        parts = [(read_tables(bits, 1, self.tables), self.tables) for _ in self._axes]
        parts.append((read_tables(bits, self.tables, stream.codewords), stream.codewords))
        self._frequencies = frequencies_of(parts, self._precision)
        self.head_size = bits.finish()
        self._chunks = split_chunks(
            data[self.head_size :], -(-stream.count // CHUNK), self._lanes, "chunks", last_size=False
        )

    def decode(self, values: NDArray[Any]) -> NDArray[Any]:
        """Returns the value of each index, of the dtype of ``values``[K]."""
        output = allocate(self._stream.count, values.dtype)
        of_indices = self._frequencies[len(self._axes) :, : self._stream.codewords]
        table = decoding_table(of_indices, values)
        classes, used = self._read_classes(*self._chunks[0], values.itemsize)
        for number, (states, words) in enumerate(self._chunks):
            start, chunk = number * CHUNK, output[number * CHUNK : (number + 1) * CHUNK]
            choices = classes.choices(start, start + len(chunk)) if self.tables > 1 else None
            used += rans_decode(bit_patterns(chunk), states, table, words[used:], self._precision, choices)
            if used != len(words) or (states != LOW).any():
                raise FormatError(f"chunk {number}: its {len(words)} words do not hold {len(chunk)} indices exactly")
            used = 0
        return output

    def classes(self) -> Classes:
        """Returns the classes of rows, columns and positions."""
        states, words = self._chunks[0]
        return self._read_classes(states.copy(), words, 1)[0]

    def _read_classes(self, states: Ints, words: NDArray[np.uint16], item_bytes: int) -> tuple[Classes, int]:
        """Returns the classes, which the first chunk begins with, and the number of words they take.

        They are read as items of the size of the values that follow, so that one kernel is compiled for both.
        """
        axes, used = [*Classes.none(self._stream.axes).axes], 0
        if self._axes:
            of_classes = self._frequencies[: len(self._axes), : self.tables]
            tables = decoding_table(of_classes, np.arange(self.tables, dtype=np.uint8)).reshape(len(self._axes), -1)
        for axis, table in zip(self._axes, tables if self._axes else (), strict=True):
            axes[axis] = np.empty(self._stream.axes[axis], f"u{item_bytes}")
            used += rans_decode(axes[axis], states, table, words[used:], self._precision)
            if used > len(words):
                raise FormatError(f"chunk 0: its {len(words)} words do not hold the classes")
        return Classes(self.tables, (axes[0], axes[1], axes[2])), used
