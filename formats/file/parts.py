"""The parts of a packed file, opened, checked and verified; what they mean is the reader's business."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from compressor.formats.dtypes import check_byte_order
from compressor.formats.errors import FileError, FormatError, IntegrityError, MissingError
from compressor.formats.file.container import MAX_HEADER, canonical_json, parse_header, read_json, recognise
from compressor.formats.file.entries import RawEntry, SiteEntry
from compressor.formats.file.layout import Key, check_sizes, layout
from compressor.formats.file.metadata import parse_metadata
from compressor.formats.file.source import FileSource, MemorySource, Source

__all__ = ["MAX_MEMORY", "PackedParts", "Sizes", "believable_memory"]

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


class PackedParts:
    """The metadata of a packed file and its verified parts; arguments and errors are those of ``PackedFile``."""

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
