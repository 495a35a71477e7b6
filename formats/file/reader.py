"""The reader of packed files: checks header and metadata first, then reads and decodes single tensors on demand.

It needs numpy alone; torch is not imported.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
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
from compressor.formats.content import (
    Codebook,
    Content,
    Indices,
    RawTensor,
    SharedTensor,
    Table,
    decode,
    find_slices,
    finish_decode,
)
from compressor.formats.dtypes import check_byte_order, constant, from_storage, to_storage
from compressor.formats.errors import FileError, FormatError, IntegrityError, MissingError, did_you_mean
from compressor.formats.file.codebooks import TableEntry, read_table
from compressor.formats.file.container import canonical_json, read_json
from compressor.formats.file.entries import RawEntry, SiteEntry, check_raw
from compressor.formats.file.layout import Key, Section, blob_sizes, check_sizes, layout, sections
from compressor.formats.file.memory import allowed_memory
from compressor.formats.file.metadata import parse_metadata
from compressor.formats.file.opening import read_opening
from compressor.formats.file.source import FileSource, MemorySource, Source
from compressor.formats.io.hub import local_path, pinned_name

__all__ = ["PackedFile", "Sizes"]

_log = logging.getLogger(__name__)

_HASH_CHUNK = 1 << 20  # bytes read at a time to be hashed
_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Sizes:
    """Sizes in bytes of a packed file and of its regions; the last five sum to ``file``."""

    file: int
    indices: int
    codebooks: int
    untouched: int
    checksums: int
    header: int


class PackedFile:
    """An open packed file whose header and metadata are checked; parts are read, verified and decoded on demand.

    Args:
        source: its bytes.
        label: what messages call it, such as its path.
        max_memory: the most bytes that its tensors may take when decoded; None, the default, for what
            ``believable_memory`` allows a file of its size.

    Raises:
        UsageError: ``max_memory`` is no whole number of 1 or more.
        UnsupportedError: another kind of file, a newer version, an unknown codec, or a big-endian machine.
        FormatError: the file does not follow SPEC.md, or its tensors take more than ``max_memory``.
        IntegrityError: the checksum of the header does not match.

    Attributes:
        sites: the shared tensors of the metadata, and stacks of them, by name, in file order.
        slices: for the name of each stored tensor the entry that holds it, and its place if that is a stack.
        untouched: the untouched tensors of the metadata, by name, in file order.
        aliases: for each further name of a tied tensor, the name it is stored under.
        book_entries: the codebooks of the metadata, in file order.
        metadata: the metadata as a JSON object.
        decoded_size: bytes of all tensors after decoding, tied ones counted under each of their names.
        max_memory: the most bytes that were allowed for them.

    Methods that read parts raise FormatError or IntegrityError where one is damaged; messages begin with ``label``.

    Example:
        >>> from compressor.formats.file.writer import pack
        >>> from compressor.formats.content import Content, Table
        >>> site = SharedTensor((2, 2), book=0, indices=np.array([0, 1, 1, 0], np.uint8))
        >>> with PackedFile.from_bytes(pack(Content({"fc.weight": site}, (Table.of([-1, 2]),)))) as file:
        ...     file.tensor("fc.weight").tolist()
        [[-1.0, 2.0], [2.0, -1.0]]
    """

    # -- opening and closing

    def __init__(self, source: Source, label: str, max_memory: int | None = None) -> None:
        self.source = source
        self.label = label
        self.max_memory = allowed_memory(max_memory, source.size)
        with self._labelled_errors():
            check_byte_order()
            self._opening = read_opening(source)
            parsed = parse_metadata(read_json(self._opening.text, "metadata"), self.max_memory)
            if parsed.version != self._opening.version:
                raise FormatError(f"metadata: version {parsed.version} in a file of {self._opening.version}")
            if canonical_json(parsed.fields) != self._opening.text:  # else one content could have two hashes
                raise FormatError("metadata: not in canonical form (order, spaces, escapes or numbers)")
            self._parts = layout(parsed)
            check_sizes(self._parts, self._opening)
            self._sections = sections(self._parts)
            end = self._opening.size + sum(section.size for section in self._sections)
            self._checksums = np.frombuffer(source.read(end, 4 * len(self._sections)), "<u4")
        self._held: tuple[Section, memoryview] | None = None  # the section read last
        self.decoded_size = parsed.decoded_size
        self.metadata: Mapping[str, Any] = parsed.fields
        self.sites: Mapping[str, SiteEntry] = parsed.sites
        self.untouched: Mapping[str, RawEntry] = parsed.untouched
        self.aliases: Mapping[str, str] = parsed.aliases
        self.slices = find_slices(parsed)
        self.model: Mapping[str, Any] | None = parsed.fields.get("model")
        self.preprocessing: Mapping[str, Any] | None = parsed.fields.get("preprocessing")
        self.recipe: Mapping[str, Any] | None = parsed.fields.get("recipe")
        self.provenance: Mapping[str, Any] = parsed.fields.get("provenance", {})
        self.book_entries = parsed.books
        self._books: dict[int, Codebook] = {}
        self._ascending = {site.book for site in self.sites.values() if codec_class(site.codec).general}

    @classmethod
    def open(cls, path: str | os.PathLike[str], max_memory: int | None = None) -> Self:
        """Opens a file on disk; all reads use one descriptor, even if the file at the path is replaced.

        Args:
            path: of the file; a text ``hf-hub:OWNER/NAME`` or ``hf-hub:OWNER/NAME@REVISION`` for one on the hub.
            max_memory: as the class.

        Raises:
            MissingError: there is no such file.
            ResourceError: it cannot be opened, read or fetched.
            FileError: as the class, or it is too large to be fetched.
        """
        found = local_path(path)
        source = FileSource(found)
        try:
            return cls(source, pinned_name(found) or os.fspath(found), max_memory)
        except BaseException:
            source.close()
            raise

    @classmethod
    def from_bytes(cls, data: bytes, max_memory: int | None = None) -> Self:
        """Opens a packed file that is in memory."""
        return cls(MemorySource(data), "packed bytes", max_memory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.source.close()

    @contextmanager
    def _labelled_errors(self) -> Iterator[None]:
        """Puts the label of the file before the message of a FileError."""
        try:
            yield
        except FileError as error:
            raise type(error)(f"{self.label}: {error}") from error

    # -- sizes

    def sizes(self) -> Sizes:
        """Returns the sizes in bytes of the file and of its regions; its metadata are a part of the header."""
        sizes = blob_sizes(self._parts)
        sizes["checksums"] = self.source.size - self._opening.size - sum(part.size for part in self._parts.values())
        return Sizes(file=self.source.size, header=self._opening.size, **sizes)

    def site_overhead(self, name: str) -> int:
        """Returns the bytes a site takes besides indices, codebook, scale and offset: its metadata.

        Of deflated metadata it is the share that its text has of the whole; in version 1 its checksums count too.

        Raises:
            MissingError: there is no such site.
        """
        if name not in self.sites:
            raise MissingError(f"{self.label}: no shared tensor {name!r}")
        entry = canonical_json(self.metadata["sites"][list(self.sites).index(name)]) + ","
        text = len(json.dumps(entry)) - 2  # a JSON text inside a JSON string: quotes are escaped
        whole = len(json.dumps(self._opening.text)) - 2
        deflated = 1.0 if self._opening.blobs else self._opening.size / whole
        checksums = sum((kind, name) in self._parts for kind in ("indices", "scale", "offset"))
        return round(deflated * text) + (4 * checksums if self._opening.blobs else 0)

    def content_sha256(self) -> str:
        """Returns the hexadecimal SHA-256 of the metadata without provenance and of all blobs but the checksums."""
        content = {key: value for key, value in self.metadata.items() if key != "provenance"}
        digest = hashlib.sha256(canonical_json(content).encode())
        end = self._opening.size + sum(section.size for section in self._sections)
        with self._labelled_errors():
            for start in range(self._opening.size, end, _HASH_CHUNK):
                digest.update(self.source.read(start, min(_HASH_CHUNK, end - start)))
        return digest.hexdigest()

    # -- parts

    def _read_part(self, key: Key) -> memoryview:
        """Returns the bytes of a part, after verifying the checksum of its section."""
        part = self._parts[key]
        section, held = self._sections[part.number], self._held
        if held is None or held[0] is not section:
            data = self.source.read(self._opening.size + section.start, section.size)
            if zlib.crc32(data) != self._checksums[part.number]:
                raise IntegrityError(f"checksum of the {section} does not match: the file is damaged, fetch it again")
            held = section, data
            if section.size > part.size:  # others of it may be asked for next
                self._held = held
        start = part.start - section.start
        return held[1][start : start + part.size]

    def _find_site(self, name: str) -> SiteEntry:
        if name not in self.sites:
            raise MissingError(f"{self.label}: no shared tensor {name!r}.{did_you_mean(name, self.sites)}")
        return self.sites[name]

    def _read_indices(self, site: SiteEntry) -> Indices:
        indices: Indices = codec_class(site.codec)().decode(self._read_part(("indices", site.name)), _stream(site))
        return indices

    def _read_book(self, number: int) -> Codebook:
        """Returns a codebook, which is read once and then kept."""
        if number not in self._books:
            entry = self.book_entries[number]
            self._books[number] = self._read_table(number, entry) if isinstance(entry, TableEntry) else entry
        return self._books[number]

    def _read_table(self, number: int, entry: TableEntry) -> Table:
        data = self._read_part(("codebook", number))
        table = read_table(data, entry, f"codebook {number}", number in self._ascending)
        if 0 < np.abs(table.values).max() < _SMALLEST_NORMAL:
            what = f"{self.label}: codebook {number}: all values are below {_SMALLEST_NORMAL:.2g} (denormal)"
            _log.warning("%s, which some processors take for 0", what)
        return table

    def _read_per_group(self, kind: str, site: SiteEntry, dtype: str | None) -> NDArray[np.float32] | None:
        """Returns the scales or offsets of a site, float32[groups]; None where it has none."""
        if dtype is None:
            return None
        values = from_storage(self._read_part((kind, site.name)), dtype)
        if not np.isfinite(values).all():
            raise FormatError(f"{kind} of {site.name!r} is not finite")
        return values

    def _read_shared(self, site: SiteEntry, indices: Indices) -> SharedTensor:
        """Returns a site with the given indices; it has a codec only where that codec generates the indices."""
        codec, kind = None, codec_class(site.codec)
        if not kind.general:
            codec = kind.of(self._read_part(("indices", site.name)), _stream(site))
        return SharedTensor(
            site.shape, site.book, indices, site.dtype, site.axis, site.block,
            scale=self._read_per_group("scale", site, site.scale),
            offset=self._read_per_group("offset", site, site.offset),
            scale_dtype=site.scale or site.offset or "F32",
            vector_axis=site.vector_axis,
            codec=codec,
        )  # fmt: skip

    # -- decoding

    @property
    def books(self) -> tuple[Codebook, ...]:
        """All codebooks, in file order."""
        return tuple(self.book(number) for number in range(len(self.book_entries)))

    def book(self, number: int) -> Codebook:
        """Returns the codebook at a position; logs a warning where all its values are denormal."""
        with self._labelled_errors():
            return self._read_book(number)

    @property
    def raw_names(self) -> tuple[str, ...]:
        """Names of the untouched tensors, in file order."""
        return tuple(self.untouched)

    def indices(self, name: str) -> Indices:
        """Returns the indices of a site, uint[count]; MissingError where there is no such site."""
        site = self._find_site(name)
        with self._labelled_errors():
            return self._read_indices(site)

    def shared(self, name: str, indices: bool = True) -> SharedTensor:
        """Returns a site as it was written.

        Args:
            name: its name.
            indices: False leaves the indices undecoded and returns a tensor with none.

        Raises:
            MissingError: there is no such site.
        """
        site = self._find_site(name)
        with self._labelled_errors():
            return self._read_shared(site, self._read_indices(site) if indices else _no_indices())

    def tensor(self, name: str) -> NDArray[Any]:
        """Returns the weights of a site, or of a slice of one, bit for bit as ``content.decode``.

        BF16 are uint16 bit patterns.

        Raises:
            MissingError: there is no such site.
        """
        holder, place = self.slices.get(name, (name, None))
        if place is not None:
            weights: NDArray[Any] = self.tensor(holder)[place]
            return weights
        site = self._find_site(name)
        with self._labelled_errors():
            book = self._read_book(site.book)
            if book.shape[::2] != (1, 1):
                return decode(self._read_shared(site, self._read_indices(site)), book)
            data = self._read_part(("indices", name))
            weights = codec_class(site.codec)().lookup(data, _stream(site), book.expand().reshape(-1))
            return finish_decode(weights, self._read_shared(site, _no_indices()))

    def raw(self, name: str) -> RawTensor:
        """Returns an untouched tensor, converted from its stored dtype to its dtype.

        Raises:
            MissingError: there is no such untouched tensor.
        """
        if name not in self.untouched:
            raise MissingError(f"{self.label}: no untouched tensor {name!r}.{did_you_mean(name, self.untouched)}")
        entry = self.untouched[name]
        if entry.value is not None:
            item = constant(entry.value, entry.dtype)
            assert item is not None  # the parser has checked it
            return RawTensor(entry.dtype, entry.shape, item * math.prod(entry.shape))
        with self._labelled_errors():
            data = self._read_part(("untouched", name))
            check_raw(data, entry.dtype, f"untouched {name!r}")
        if entry.stored == entry.dtype:
            return RawTensor(entry.dtype, entry.shape, bytes(data))
        return RawTensor(
            entry.dtype, entry.shape, to_storage(from_storage(data, entry.stored), entry.dtype), entry.stored
        )

    def content(self) -> Content:
        """Returns the decoded content of the whole file."""
        return Content(
            {name: self.shared(name) for name in self.sites},
            self.books,
            {name: self.raw(name) for name in self.untouched},
            self.aliases, self.model, self.preprocessing, self.recipe, self.provenance,
        )  # fmt: skip

    # -- checking

    def check(self) -> list[FileError]:
        """Decodes all parts and returns an error for each codebook or tensor that is damaged."""
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


def _stream(site: SiteEntry) -> Stream:
    return Stream(site.name, site.count, site.codewords, site.index_shape)


def _no_indices() -> Indices:
    return np.empty(0, np.uint8)
