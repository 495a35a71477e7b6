"""The layout of a packed file: position and size of each part, the same list for writer, reader and report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from compressor.formats.dtypes import ITEM_SIZES
from compressor.formats.errors import FormatError
from compressor.formats.file.codebooks import TableEntry
from compressor.formats.file.container import BLOBS
from compressor.formats.file.metadata import Metadata

__all__ = ["Key", "Part", "blob_sizes", "check_sizes", "layout"]

Key = tuple[str, str | int]
"""What a part holds: ("indices" | "scale" | "offset" | "untouched", a tensor's name) or ("codebook", its position)."""


@dataclass(frozen=True)
class Part:
    """A contiguous range of bytes that has a checksum.

    Args:
        key: what it holds.
        blob: the blob it is in.
        start: its first byte, counted from the end of the header.
        size: its size in bytes.
        number: the position of its CRC-32 in ``checksums``.
    """

    key: Key
    blob: str
    start: int
    size: int
    number: int

    def __str__(self) -> str:
        kind, which = self.key
        return f"codebook {which}" if kind == "codebook" else f"{kind} of {which!r}"


def layout(metadata: Metadata) -> dict[Key, Part]:
    """Returns all parts by key, in file order."""
    parts: dict[Key, Part] = {}
    start = 0
    for key, blob, size in _walk(metadata):
        parts[key] = Part(key, blob, start, size, len(parts))
        start += size
    return parts


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
        yield ("untouched", raw.name), "untouched", raw.size


def blob_sizes(parts: Mapping[Key, Part]) -> dict[str, int]:
    """Returns the size of each blob in bytes; there is a checksum for each part and one for the header."""
    sizes = dict.fromkeys(BLOBS, 0)
    for part in parts.values():
        sizes[part.blob] += part.size
    sizes["checksums"] = 4 * (len(parts) + 1)
    return sizes


def check_sizes(parts: Mapping[Key, Part], sizes: Mapping[str, int]) -> None:
    """Checks that the parts fill each blob exactly.

    Args:
        parts: as ``layout`` returns them.
        sizes: the size of each blob in bytes, as the header declares it.

    Raises:
        FormatError: a blob is larger or smaller than its parts.
    """
    declared = blob_sizes(parts)
    for blob in BLOBS:
        if declared[blob] != sizes[blob]:
            raise FormatError(f"blob {blob!r} has {sizes[blob]:,} bytes, expected {declared[blob]:,} by the metadata")
