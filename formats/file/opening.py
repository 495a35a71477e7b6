"""The opening of a packed file: all that stands before its parts, in each version of the format (SPEC.md, 1 and 6)."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from compressor.formats.errors import FormatError, IntegrityError, UnsupportedError
from compressor.formats.file.container import (
    KEY,
    MAX_HEADER,
    check_end,
    framed,
    parse_blobs,
    read_header,
    recognise,
)
from compressor.formats.file.deflate import deflate, inflate
from compressor.formats.file.source import Source

__all__ = ["TENSOR", "VERSION", "Opening", "check_version", "opening_bytes", "read_opening"]

VERSION = 2
"""The version of the format that this release writes, and the latest that it reads."""

TENSOR = "packed-v2"
"""The name of the one tensor of a file. Readers of version 1 refuse it, and name it."""

_SIZES = struct.Struct("<II")  # bytes of the metadata, and of the deflated metadata after them
_MAX_METADATA, _ALWAYS_ALLOWED, _MAX_RATIO = 1 << 24, 1 << 18, 32  # bytes of metadata, see ``_check_metadata_size``


@dataclass(frozen=True)
class Opening:
    """What stands before the parts of a file.

    Args:
        version: of the format.
        text: the metadata.
        size: the position of the first part, in bytes.
        blobs: the size of each blob in a file of version 1; else None.
        data: bytes from the first part to the end of the file.
    """

    version: int
    text: str
    size: int
    blobs: Mapping[str, int] | None
    data: int


def check_version(version: int) -> None:
    """Checks that a file is of a version that this release reads.

    Raises:
        UnsupportedError: it is newer.
    """
    if version > VERSION:
        newer = f"format version {ascii(version)[:80]}, this release reads up to {VERSION}"
        raise UnsupportedError(f"{newer}: upgrade timm-compressor")


def opening_bytes(text: str, data: int) -> bytes:
    """Returns all bytes of a file before its parts: header, sizes, deflated metadata and their checksum.

    Args:
        text: the metadata, in ASCII.
        data: bytes of all parts and of their checksums.

    Raises:
        FormatError: there are more metadata than a reader accepts.
    """
    if len(text) > _MAX_METADATA:  # to deflate them would take minutes
        raise FormatError(f"metadata of {len(text):,} bytes, expected at most {_MAX_METADATA:,}")
    deflated = deflate(text.encode("ascii"))
    _check_metadata_size(len(text), len(deflated))
    metadata = _SIZES.pack(len(text), len(deflated)) + deflated
    opening = _header(len(metadata) + 4 + data) + metadata
    return opening + struct.pack("<I", zlib.crc32(opening))


def read_opening(source: Source) -> Opening:
    """Reads and checks the opening of a file, with its checksum.

    Raises:
        UnsupportedError: another kind of file, or a newer version.
        FormatError: it does not follow SPEC.md.
        IntegrityError: the checksum does not match.
    """
    start = bytes(source.read(0, min(9, source.size)))
    if start[8:] != b"{":  # without this, the length field of a 640-byte header (80 02) passes for a pickle
        recognise(start)
    if source.size < 8:
        what = "an empty file" if not source.size else f"{source.size} bytes, too short for a packed file"
        raise FormatError(f"{what}: fetch or write it again")
    length = struct.unpack("<Q", start[:8])[0]
    if length > min(MAX_HEADER, source.size - 8):
        kind = "not a packed file, or cut" if start[8:] == b"{" else "not a safetensors file, and so no packed one"
        raise FormatError(f"header of {length:,} bytes in a file of {source.size:,}: {kind}")
    start = bytes(source.read(0, 8 + length))
    text, data = start[8:], source.size - 8 - length
    header, notes = read_header(text)
    numbered = re.fullmatch("[1-9][0-9]{0,8}", notes)
    if not numbered and TENSOR not in header:
        return _opening_1(source, start, notes, parse_blobs(header, notes, text, data))
    if not numbered:
        raise FormatError(f"header: metadata {KEY!r} is {ascii(notes)[:80]}, expected the version of the format")
    check_version(int(notes))
    entry = header.get(TENSOR)
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or len(shape) != 1 or type(shape[0]) is not int:
        raise FormatError(f"header: no tensor {TENSOR!r} of one dimension")
    check_end(shape[0], data)
    if _header(data) != start:
        raise FormatError("header: not in canonical form (fields, order, spaces or padding)")
    return _opening_2(source, start)


def _header(data: int) -> bytes:
    """Returns the first 8 + n bytes of a file: the length n of the safetensors header, and the header."""
    tensor = {"dtype": "U8", "shape": [data], "data_offsets": [0, data]}
    return framed({"__metadata__": {KEY: str(VERSION)}, TENSOR: tensor})


def _opening_1(source: Source, start: bytes, metadata: str, blobs: Mapping[str, int]) -> Opening:
    """Returns the opening of a file of version 1, whose header holds the metadata and whose last bytes its checksum."""
    if blobs["checksums"] < 4:
        raise FormatError("no checksum of the header")
    _check_sum(start, source.read(source.size - 4, 4))
    return Opening(1, metadata, len(start), blobs, source.size - len(start))


def _opening_2(source: Source, start: bytes) -> Opening:
    """Returns the opening of a file whose first bytes, with the safetensors header, are ``start``."""
    rest = source.size - len(start)
    if rest < _SIZES.size + 4:
        raise FormatError(f"{rest} bytes after the header, too few for the metadata")
    sizes = bytes(source.read(len(start), _SIZES.size))
    size, deflated = _SIZES.unpack(sizes)
    if _SIZES.size + deflated + 4 > rest:
        raise FormatError(f"metadata of {deflated:,} bytes in a file of {source.size:,}")
    _check_metadata_size(size, deflated)
    stream = bytes(source.read(len(start) + _SIZES.size, deflated + 4))
    opening = start + sizes + stream[:-4]
    _check_sum(opening, stream[-4:])
    text = inflate(stream[:-4], size)
    if not text.isascii():
        raise FormatError("metadata: not in canonical form (not ASCII)")
    end = len(opening) + 4
    return Opening(VERSION, text.decode("ascii"), end, None, source.size - end)


def _check_sum(opening: bytes, stored: bytes | memoryview) -> None:
    """Checks the first bytes of a file against their CRC-32, as it is stored."""
    if zlib.crc32(opening) != struct.unpack("<I", stored)[0]:
        raise IntegrityError("checksum of the header does not match: the file is damaged, fetch it again")


def _check_metadata_size(size: int, deflated: int) -> None:
    """Checks the size of metadata before they are inflated: a few bytes must not become many objects in memory."""
    most = min(_MAX_METADATA, _ALWAYS_ALLOWED + _MAX_RATIO * deflated)
    if size > most:
        raise FormatError(f"metadata of {size:,} bytes deflated to {deflated:,}, expected at most {most:,} bytes")
