"""Read a packed file: every check first, then only what is asked for. No torch in here."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from compressor.formats.codecs.base import Stream
from compressor.formats.codecs.registry import codec_class
from compressor.formats.content import Codebook, Content, Indices, RawTensor, SharedTensor, decode, finish_decode
from compressor.formats.dtypes import check_byte_order, from_storage, to_storage
from compressor.formats.errors import FileError, FormatError, IntegrityError, MissingError, did_you_mean
from compressor.formats.file.codebooks import TableEntry, read_table
from compressor.formats.file.container import MAX_HEADER, canonical_json, parse_header, read_json, recognise
from compressor.formats.file.entries import RawEntry, SiteEntry, check_raw
from compressor.formats.file.layout import Key, check_sizes, layout
from compressor.formats.file.metadata import parse_metadata
from compressor.formats.file.source import FileSource, MemorySource, Source

__all__ = ["MAX_MEMORY", "PackedFile", "Sizes", "believable_memory"]

_log = logging.getLogger(__name__)
_DENORMAL = float(np.finfo(np.float32).tiny)
MAX_MEMORY = 32 << 30
ALWAYS = 256 << 20  # what a file of any size may take
EXPANSION = 1_000  # 0.03 bits a float32 weight


def believable_memory(file_size: int) -> int:
    """Give the bytes of tensors that a file of this size may decode to before it is asked whether it can be trusted.

    A codec of less than a bit an index can make any number of weights of a few bytes. A sender should need bytes to
    cost the reader memory, and half of what the machine has is left for what decoding takes besides.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(MAX_MEMORY, memory // 2, max(ALWAYS, EXPANSION * file_size))


@dataclass(frozen=True)
class Sizes:
    """Bytes of a packed file; the last five sum to the first."""

    file: int
    indices: int
    codebooks: int
    untouched: int
    checksums: int
    header: int


class PackedFile:
    """A packed file, opened and checked; parts are read, verified and decoded when asked for.

    Args:
        source: where its bytes are.
        label: what messages call it.
        max_memory: refuse files whose tensors take more bytes than this when decoded.

    Raises:
        UnsupportedError: another kind of file, a newer version, an unknown codec.
        FormatError, IntegrityError: a damaged or hostile file.

    Example:
        >>> from compressor.formats.file.writer import pack
        >>> from compressor.formats.content import Content, Table
        >>> site = SharedTensor((2, 2), book=0, indices=np.array([0, 1, 1, 0], np.uint8))
        >>> with PackedFile.from_bytes(pack(Content({"fc.weight": site}, (Table.of([-1, 2]),)))) as file:
        ...     file.tensor("fc.weight").tolist()
        [[-1.0, 2.0], [2.0, -1.0]]
    """

    def __init__(self, source: Source, label: str, max_memory: int = MAX_MEMORY) -> None:
        self.source = source
        self.label = label
        with self._named():
            check_byte_order()
            text, sizes = self._read_header()
            parsed = parse_metadata(read_json(text, "metadata"), max_memory)
            self._parts = layout(parsed)
            check_sizes(self._parts, sizes)
            start = self.source.size - sizes["checksums"]
            self._checksums = np.frombuffer(source.read(start, sizes["checksums"]), "<u4")
        self._sizes = sizes
        self.decoded_size = parsed.decoded_size
        self.metadata: Mapping[str, Any] = parsed.fields
        self.sites: Mapping[str, SiteEntry] = parsed.sites
        self.untouched: Mapping[str, RawEntry] = parsed.untouched
        self.aliases: Mapping[str, str] = parsed.aliases
        self.model: Mapping[str, Any] | None = parsed.fields.get("model")
        self.preprocessing: Mapping[str, Any] | None = parsed.fields.get("preprocessing")
        self.recipe: Mapping[str, Any] | None = parsed.fields.get("recipe")
        self.provenance: Mapping[str, Any] = parsed.fields.get("provenance", {})
        self.book_entries = parsed.books
        self._books: dict[int, Codebook] = {}
        self._ascending = {site.book for site in self.sites.values() if codec_class(site.codec).general}

    @classmethod
    def open(cls, path: str | os.PathLike[str], max_memory: int = MAX_MEMORY) -> Self:
        """Open a file on disk, once: all reads go through the same descriptor."""
        source = FileSource(path)
        try:
            return cls(source, os.fspath(path), max_memory)
        except BaseException:
            source.close()
            raise

    @classmethod
    def from_bytes(cls, data: bytes, max_memory: int = MAX_MEMORY) -> Self:
        """Read a packed file in memory."""
        return cls(MemorySource(data), "packed bytes", max_memory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.source.close()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except FileError as error:
            raise type(error)(f"{self.label}: {error}") from error

    def _read_header(self) -> tuple[str, dict[str, int]]:
        """Check the header and its checksum, which is the last four bytes of the file."""
        start = bytes(self.source.read(0, min(9, self.source.size)))
        if start[8:] != b"{":  # else a header of 640 bytes would pass for a pickle
            recognise(start)
        if self.source.size < 8:
            raise FormatError(f"{self.source.size} bytes, too short for a packed file")
        length = struct.unpack("<Q", start[:8])[0]
        if length > min(MAX_HEADER, self.source.size - 8):
            raise FormatError(
                f"header of {length:,} bytes in a file of {self.source.size:,}: not a packed file, or cut"
            )
        header = self.source.read(0, 8 + length)
        text, sizes = parse_header(bytes(header[8:]), self.source.size - 8 - length)
        if sizes["checksums"] < 4:
            raise FormatError("no checksum of the header")
        stored = struct.unpack("<I", self.source.read(self.source.size - 4, 4))[0]
        if zlib.crc32(header) != stored:
            raise IntegrityError("checksum of the header does not match: the file is damaged, fetch it again")
        self._header_size = 8 + length
        return text, sizes

    def _part(self, key: Key) -> memoryview:
        """Read a part and verify its checksum."""
        part = self._parts[key]
        data = self.source.read(self._header_size + part.start, part.size)
        if zlib.crc32(data) != self._checksums[part.number]:
            raise IntegrityError(f"checksum of the {part} does not match: the file is damaged, fetch it again")
        return data

    def sizes(self) -> Sizes:
        """Give the bytes of the file by what they hold."""
        return Sizes(file=self.source.size, header=self._header_size, **self._sizes)

    def site_overhead(self, name: str) -> int:
        """Give the bytes a site costs apart from indices and codebook: its header record and checksums."""
        if name not in self.sites:
            raise MissingError(f"{self.label}: no shared tensor {name!r}")
        record = self.metadata["sites"][list(self.sites).index(name)]
        text = json.dumps(canonical_json(record))[1:-1] + ","  # escaped, as it stands in the header
        checksums = sum((kind, name) in self._parts for kind in ("indices", "scale", "offset"))
        return len(text) + 4 * checksums

    def content_sha256(self) -> str:
        """Hash the content: metadata without provenance, then indices, codebooks and untouched bytes."""
        content = {key: value for key, value in self.metadata.items() if key != "provenance"}
        digest = hashlib.sha256(canonical_json(content).encode())
        end = self.source.size - self._sizes["checksums"]
        with self._named():
            for start in range(self._header_size, end, 1 << 20):
                digest.update(self.source.read(start, min(1 << 20, end - start)))
        return digest.hexdigest()

    def _site(self, name: str) -> SiteEntry:
        if name not in self.sites:
            raise MissingError(f"{self.label}: no shared tensor {name!r}.{did_you_mean(name, self.sites)}")
        return self.sites[name]

    def _indices(self, site: SiteEntry) -> Indices:
        stream = Stream(site.name, site.count, site.codewords)
        indices: Indices = codec_class(site.codec)().decode(self._part(("indices", site.name)), stream)
        return indices

    def _book(self, number: int) -> Codebook:
        if number not in self._books:
            entry = self.book_entries[number]
            if isinstance(entry, TableEntry):
                data = self._part(("codebook", number))
                table = read_table(data, entry, f"codebook {number}", number in self._ascending)
                if 0 < np.abs(table.values).max() < _DENORMAL:
                    what = f"{self.label}: codebook {number}: all values are below {_DENORMAL:.2g} (denormal)"
                    _log.warning("%s, which some processors take for 0", what)
                self._books[number] = table
            else:
                self._books[number] = entry
        return self._books[number]

    def _per_group(self, kind: str, site: SiteEntry, dtype: str | None) -> NDArray[np.float32] | None:
        if dtype is None:
            return None
        values = from_storage(self._part((kind, site.name)), dtype)
        if not np.isfinite(values).all():
            raise FormatError(f"{kind} of {site.name!r} is not finite")
        return values

    def _shared(self, site: SiteEntry, indices: Indices) -> SharedTensor:
        """Make the record of a site; its codec is named only where that codec generates the indices."""
        codec, found = None, codec_class(site.codec)
        if not found.general:
            stream = Stream(site.name, site.count, site.codewords)
            codec = found.of(self._part(("indices", site.name)), stream)
        return SharedTensor(
            site.shape, site.book, indices, site.dtype, site.axis, site.block,
            scale=self._per_group("scale", site, site.scale),
            offset=self._per_group("offset", site, site.offset),
            scale_dtype=site.scale or site.offset or "F32",
            vector_axis=site.vector_axis,
            codec=codec,
        )  # fmt: skip

    @property
    def books(self) -> tuple[Codebook, ...]:
        """All codebooks."""
        return tuple(self.book(number) for number in range(len(self.book_entries)))

    def book(self, number: int) -> Codebook:
        """Decode one codebook."""
        with self._named():
            return self._book(number)

    @property
    def raw_names(self) -> tuple[str, ...]:
        """Names of the untouched tensors."""
        return tuple(self.untouched)

    def indices(self, name: str) -> Indices:
        """Decode the indices of a site, uint[count]."""
        site = self._site(name)
        with self._named():
            return self._indices(site)

    def shared(self, name: str, indices: bool = True) -> SharedTensor:
        """Give a site as the record it was written from; without ``indices``, none are decoded and it has none."""
        site = self._site(name)
        with self._named():
            return self._shared(site, self._indices(site) if indices else np.empty(0, np.uint8))

    def tensor(self, name: str) -> NDArray[Any]:
        """Decode a site to its weights, as ``record.decode`` does; BF16 as uint16 bit patterns."""
        site = self._site(name)
        with self._named():
            book = self._book(site.book)
            if book.shape[::2] != (1, 1):
                return decode(self._shared(site, self._indices(site)), book)
            stream = Stream(site.name, site.count, site.codewords)
            data = self._part(("indices", name))
            weights = codec_class(site.codec)().lookup(data, stream, book.expand().reshape(-1))
            return finish_decode(weights, self._shared(site, np.empty(0, np.uint8)))

    def raw(self, name: str) -> RawTensor:
        """Give an untouched tensor, expanded from the dtype it is stored in."""
        if name not in self.untouched:
            raise MissingError(f"{self.label}: no untouched tensor {name!r}.{did_you_mean(name, self.untouched)}")
        entry = self.untouched[name]
        with self._named():
            data = self._part(("untouched", name))
            check_raw(data, entry.dtype, f"untouched {name!r}")
        if entry.stored == entry.dtype:
            return RawTensor(entry.dtype, entry.shape, bytes(data))
        return RawTensor(
            entry.dtype, entry.shape, to_storage(from_storage(data, entry.stored), entry.dtype), entry.stored
        )

    def content(self) -> Content:
        """Decode everything."""
        return Content(
            {name: self.shared(name) for name in self.sites},
            self.books,
            {name: self.raw(name) for name in self.untouched},
            self.aliases, self.model, self.preprocessing, self.recipe, self.provenance,
        )  # fmt: skip

    def check(self) -> list[FileError]:
        """Decode everything and list what is wrong with every part."""
        probes: list[Callable[[], object]] = [partial(self.book, number) for number in range(len(self.book_entries))]
        probes += [partial(self.shared, name) for name in self.sites]
        probes += [partial(self.raw, name) for name in self.untouched]
        errors = []
        for probe in probes:
            try:
                probe()
            except FileError as error:
                errors.append(error)
        return errors
