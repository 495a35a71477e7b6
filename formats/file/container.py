"""The safetensors header of a packed file, and JSON read and written strictly (SPEC.md, 1 and 2).

Blobs are the four byte tensors of a file of version 1; a file of version 2 has one tensor, see ``opening``.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

from compressor.formats.errors import FormatError, UnsupportedError

__all__ = [
    "BLOBS",
    "KEY",
    "MAX_DEPTH",
    "MAX_HEADER",
    "canonical_json",
    "check_end",
    "framed",
    "header_bytes",
    "parse_blobs",
    "read_header",
    "read_json",
    "recognise",
]

KEY = "timm-compressor"
"""The key of the metadata string in the safetensors header."""

BLOBS = ("indices", "codebooks", "untouched", "checksums")
"""Names of the byte tensors, in file order."""

MAX_HEADER = 16 << 20
"""Largest size of the JSON header, in bytes."""

MAX_DEPTH = 24
"""Most levels of nested objects and lists in JSON."""

_NEXT_STEP = "expected one that `compress MODEL` wrote; `compress pack MODEL --checkpoint-path FILE` packs a checkpoint"
_OTHER_KINDS = {
    b"PK\x03\x04": "a zip archive (perhaps a .pth checkpoint)",
    b"\x80\x02": "a pickle (perhaps a .pth checkpoint)",
    b"\x80\x03": "a pickle (perhaps a .pth checkpoint)",
    b"\x80\x04": "a pickle (perhaps a .pth checkpoint)",
    b"\x80\x05": "a pickle (perhaps a .pth checkpoint)",
    b"GGUF": "a GGUF file",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip file",
    b"\x89PNG": "an image (PNG)",
    b"\xff\xd8\xff": "an image (JPEG)",
}


def canonical_json(fields: object) -> str:
    r"""Returns the canonical JSON text of a value: sorted keys, no spaces, ASCII.

    Raises:
        ValueError: the value holds NaN or an infinity.
        TypeError: the value holds what JSON cannot express.

    >>> canonical_json({"b": [1, 2], "a": "é"})
    '{"a":"\\u00e9","b":[1,2]}'
    """
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)


def header_bytes(metadata: str, sizes: Mapping[str, int]) -> bytes:
    """Returns the first 8 + n bytes of a file of version 1: the length n of the header, and the header.

    Args:
        metadata: the metadata text.
        sizes: bytes of each of ``BLOBS``.

    Raises:
        FormatError: the header is larger than MAX_HEADER.

    >>> header_bytes("{}", {"indices": 2, "codebooks": 0, "untouched": 0, "checksums": 4})[8:62]
    b'{"__metadata__":{"timm-compressor":"{}"},"indices":{"d'
    """
    header: dict[str, Any] = {"__metadata__": {KEY: metadata}}
    start = 0
    for blob in BLOBS:
        end = start + sizes[blob]
        header[blob] = {"dtype": "U8", "shape": [sizes[blob]], "data_offsets": [start, end]}
        start = end
    start_of_file = framed(header)
    if len(start_of_file) - 8 > MAX_HEADER:
        raise FormatError(f"header of {len(start_of_file) - 8:,} bytes, expected at most {MAX_HEADER:,}")
    return start_of_file


def framed(header: Mapping[str, Any]) -> bytes:
    """Returns a safetensors header as bytes: the length of its text (u64), and the text padded to a multiple of eight.

    >>> framed({})[8:]
    b'{}      '
    """
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def recognise(start: bytes) -> None:
    """Checks that the first bytes of a file are not those of another kind of file.

    Args:
        start: up to nine bytes, of which the last is not that of a safetensors header.

    Raises:
        UnsupportedError: they are; the message names the kind.
    """
    kinds = (kind for magic, kind in _OTHER_KINDS.items() if start.startswith(magic))
    text = "a text file" if len(start) > 8 and all(32 <= byte < 127 or byte in b"\t\n\r" for byte in start) else None
    if kind := next(kinds, text):
        raise UnsupportedError(f"this is {kind}, not a safetensors file and so no packed one; {_NEXT_STEP}")


def read_json(text: str | bytes, what: str) -> Any:
    """Parses JSON strictly.

    Args:
        text: the JSON text.
        what: what messages call it.

    Raises:
        FormatError: the text is not JSON, has duplicate keys, NaN or infinities, or more than MAX_DEPTH levels.
    """
    try:
        value = json.loads(
            text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite_number
        )
    except FormatError as error:
        raise FormatError(f"{what}: {error}") from error
    except RecursionError as error:
        raise FormatError(f"{what}: nested too deeply, expected at most {MAX_DEPTH} levels") from error
    except ValueError as error:  # not JSON, not UTF-8, a number of too many digits
        raise FormatError(f"{what}: not valid JSON ({str(error)[:80]})") from error
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in _children(node)]
    if level:
        raise FormatError(f"{what}: nested too deeply, expected at most {MAX_DEPTH} levels")
    return value


def _children(node: Any) -> list[Any]:
    return list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise FormatError(f"key {key[:80]!r} given twice")
        fields[key] = value
    return fields


def _no_constant(literal: str) -> None:
    raise FormatError(f"{literal} is not a number here")


def _finite_number(literal: str) -> float:
    number = float(literal)
    if math.isinf(number):
        raise FormatError(f"{literal[:80]} is beyond the range of float64")
    return number


def read_header(text: bytes) -> tuple[dict[str, Any], str]:
    """Reads a safetensors header and returns it with the string that ``KEY`` has in its metadata.

    Args:
        text: the n bytes after the length field.

    Raises:
        UnsupportedError: the file is an ordinary safetensors file.
        FormatError: the text is not JSON, or has no such string.
    """
    header = read_json(text, "header")
    if not isinstance(header, dict):
        raise FormatError("header: expected a JSON object")
    notes = header.get("__metadata__")
    if not isinstance(notes, dict) or KEY not in notes:
        if all(isinstance(entry, dict) and ("data_offsets" in entry or entry is notes) for entry in header.values()):
            raise UnsupportedError(f"this is a plain safetensors file, not a packed one; {_NEXT_STEP}")
        raise FormatError(f"header: no metadata {KEY!r}, expected a packed file")
    metadata = notes[KEY]
    if not isinstance(metadata, str):
        raise FormatError(f"header: metadata {KEY!r} is not a string")
    return header, metadata


def parse_blobs(header: Mapping[str, Any], metadata: str, text: bytes, data_size: int) -> dict[str, int]:
    """Checks the header of a file of version 1 and returns the size of each blob in bytes.

    Args:
        header, metadata: what ``read_header`` returns for ``text``.
        text: the n bytes after the length field.
        data_size: the number of bytes in the file after the header.

    Raises:
        FormatError: the header is not the one that ``header_bytes`` returns for its metadata and sizes.
    """
    unknown = sorted({*header} - {"__metadata__", *BLOBS} | {*header["__metadata__"]} - {KEY})
    missing = [blob for blob in BLOBS if blob not in header]
    if unknown or missing:
        fault = f"unknown field {unknown[0][:80]!r}" if unknown else f"no tensor {missing[0]!r}"
        raise FormatError(f"header: {fault}, expected {', '.join(BLOBS)}")
    sizes = _blob_sizes(header)
    check_end(sum(sizes.values()), data_size)
    if header_bytes(metadata, sizes)[8:] != text:
        raise FormatError("header: not in canonical form (order, spaces, padding or escapes)")
    return sizes


def _blob_sizes(header: Mapping[str, Any]) -> dict[str, int]:
    """Returns the size of each blob, after checking that the blobs follow each other without hole or overlap."""
    sizes: dict[str, int] = {}
    start = 0
    for blob in BLOBS:
        entry = header[blob]
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(offset) is int for offset in offsets)):
            raise FormatError(f"header: tensor {blob!r} has no two whole data_offsets")
        if offsets[0] != start or offsets[1] < start:
            raise FormatError(f"header: tensor {blob!r} at {offsets}, expected to begin at {start}: hole or overlap")
        size = offsets[1] - start
        if entry != {"dtype": "U8", "shape": [size], "data_offsets": offsets}:
            raise FormatError(f"header: tensor {blob!r}, expected dtype U8 and shape [{size}]")
        sizes[blob] = size
        start = offsets[1]
    return sizes


def check_end(declared: int, actual: int) -> None:
    """Checks that a file has as many bytes of data as its header declares.

    Raises:
        FormatError: it has fewer or more.
    """
    if declared > actual:
        raise FormatError(
            f"the file ends {declared - actual:,} bytes early ({actual:,} of {declared:,} data bytes): "
            "incomplete download? Fetch it again"
        )
    if declared < actual:
        raise FormatError(f"{actual - declared:,} bytes after the end of the data: not written by this tool")
