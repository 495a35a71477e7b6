"""The layout of a packed file: position and size of each part, the same list for writer, reader and report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from compressor.formats.dtypes import ITEM_SIZES
from compressor.formats.errors import FormatError
from compressor.formats.file.codebooks import TableEntry
from compressor.formats.file.container import BLOBS
from compressor.formats.file.entries import shown
from compressor.formats.file.metadata import Metadata
from compressor.formats.file.opening import Opening

__all__ = ["Key", "Part", "Section", "blob_sizes", "check_sizes", "layout", "sections"]

_SECTION = 1 << 16  # bytes from which on a section takes no further part

Key = tuple[str, str | int]
"""What a part holds: ("indices" | "scale" | "offset" | "untouched", a tensor's name) or ("codebook", its position)."""


@dataclass(frozen=True)
class Part:
    """A contiguous range of bytes.

    Args:
        key: what it holds.
        blob: the kind of part it is: a blob of a file of version 1.
        start: its first byte, counted from the first byte of the first part.
        size: its size in bytes.
        number: the position of its section in ``sections``.
    """

    key: Key
    blob: str
    start: int
    size: int
    number: int

    def __str__(self) -> str:
        kind, which = self.key
        return f"codebook {which}" if isinstance(which, int) else f"{kind} of {shown(which)!r}"


@dataclass(frozen=True)
class Section:
    """Consecutive parts that have a CRC-32 together, in the order of ``sections`` at the end of the file.

    Args:
        parts: the first and the last, or the only one.
        start: its first byte, counted from the first byte of the first part.
        size: its size in bytes.
    """

    parts: tuple[Part, ...]
    start: int
    size: int

    def __str__(self) -> str:
        return " to the ".join(map(str, self.parts))


def layout(metadata: Metadata) -> dict[Key, Part]:
    """Returns all parts by key, in file order.

    A section takes parts until it has ``_SECTION`` bytes, and none of so many after its first; in version 1 each part
    is one.
    """
    parts: dict[Key, Part] = {}
    start = number = section = 0
    for key, blob, size in _walk(metadata):
        if parts and (metadata.version == 1 or max(start - section, size) >= _SECTION):
            number, section = number + 1, start
        parts[key] = Part(key, blob, start, size, number)
        start += size
    return parts


def sections(parts: Mapping[Key, Part]) -> list[Section]:
    """Returns the sections of the parts that ``layout`` returns, in file order."""
    members: dict[int, list[Part]] = {}
    for part in parts.values():
        members.setdefault(part.number, []).append(part)
    return [
        Section((found[0], found[-1])[: len(found)], found[0].start, sum(part.size for part in found))
        for found in members.values()
    ]


def _walk(metadata: Metadata) -> Iterator[tuple[Key, str, int]]:
    """Yields key, blob and size of each part in file order."""
    for site in metadata.sites.values():
        yield ("indices", site.name), "indices", site.size
    for number, book in enumerate(metadata.books):
        if isinstance(book, TableEntry):
            yield ("codebook", number), "codebooks", book.size
    for site in metadata.sites.values():
        if site.scale is not None:
            yield ("scale", site.name), "codebooks", site.groups * ITEM_SIZES[site.scale]
        if site.offset is not None:
            yield ("offset", site.name), "codebooks", site.groups * ITEM_SIZES[site.offset]
    for raw in metadata.untouched.values():
        if raw.value is None:
            yield ("untouched", raw.name), "untouched", raw.size


def blob_sizes(parts: Mapping[Key, Part]) -> dict[str, int]:
    """Returns the bytes of all parts of each kind, and of the checksums of their sections."""
    sizes = dict.fromkeys(BLOBS, 0)
    for part in parts.values():
        sizes[part.blob] += part.size
    sizes["checksums"] = 4 * len({part.number for part in parts.values()})
    return sizes


def check_sizes(parts: Mapping[Key, Part], opening: Opening) -> None:
    """Checks that the parts and their checksums fill a file exactly: in version 1 each blob.

    Args:
        parts: as ``layout`` returns them.
        opening: that of the file.

    Raises:
        FormatError: they take more or fewer bytes.
    """
    sizes = blob_sizes(parts)
    if opening.blobs is None:
        if sum(sizes.values()) != opening.data:
            raise FormatError(f"{opening.data:,} bytes of data, expected {sum(sizes.values()):,} by the metadata")
        return
    sizes["checksums"] += 4  # of the header
    for blob in BLOBS:
        if sizes[blob] != opening.blobs[blob]:
            found = f"blob {blob!r} has {opening.blobs[blob]:,} bytes"
            raise FormatError(f"{found}, expected {sizes[blob]:,} by the metadata")
