"""A small packed file, and functions that make one thing in it wrong while all checksums stay right."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from compressor.formats.codecs.registry import CODECS
from compressor.formats.content import Content, Grid, RawTensor, SharedTensor, Table
from compressor.formats.errors import FileError
from compressor.formats.file.container import BLOBS, KEY, canonical_json, header_bytes
from compressor.formats.file.layout import layout
from compressor.formats.file.metadata import parse_metadata
from compressor.formats.file.reader import PackedFile
from compressor.formats.file.writer import pack
from tests.formats.codecs.test_contract import sample

Fields = dict[str, Any]


def small(codec_id: str = "bits") -> bytes:
    """Packs a file that has one of everything, in under 2 KB."""
    codec = CODECS[codec_id]()
    site = SharedTensor((4, 10), 0, sample(codec_id, 40, 5, 0), codec=codec)
    scaled = SharedTensor((6,), 1, np.array([0, 1, 2, 3, 0, 1], np.uint8), "F16", block=3, scale=np.ones(2, np.float32))
    raw = RawTensor("F32", (2,), np.ones(2, np.float32).tobytes(), "F16")
    return pack(
        Content(
            {"fc.weight": site, "head.weight": scaled}, (Table.of([-1.0, 0.0, 0.5, 1.0, 2.0]), Grid(0.0, 0.5, 4)),
            {"norm.weight": raw, "norm.count": RawTensor("I64", (), bytes(8))}, {"tied.weight": "fc.weight"},
            {"name": "test_resnet", "args": {}}, provenance={"seed": 0},
        ),
        "bits",
    )  # fmt: skip


def split(data: bytes) -> tuple[Fields, dict[str, bytes]]:
    """Returns the metadata and the blobs of a file."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    blobs = {}
    for blob in BLOBS:
        start, end = header[blob]["data_offsets"]
        blobs[blob] = data[8 + size + start : 8 + size + end]
    return json.loads(header["__metadata__"][KEY]), blobs


def sealed(header: bytes, data: bytes) -> bytes:
    """Joins header and data under the right checksum of the header."""
    return header + data[:-4] + struct.pack("<I", zlib.crc32(header))


def forged(edit: Callable[[Fields], object] = lambda fields: None, blobs: dict[str, bytes] | None = None) -> bytes:
    """Edits the small file and recomputes all checksums, so that only the edit is at fault."""
    return forged_from(small(), edit, blobs)


def forged_from(data: bytes, edit: Callable[[Fields], object], blobs: dict[str, bytes] | None = None) -> bytes:
    """Edits a good file and recomputes all checksums."""
    fields, parts = split(data)
    edit(fields)
    parts.update(blobs or {})
    body = b"".join(parts[blob] for blob in BLOBS[:3])
    text = canonical_json(fields)
    try:
        order = layout(parse_metadata(json.loads(text), 1 << 40)).values()
        sums = [zlib.crc32(body[part.start : part.start + part.size]) for part in order]
        parts["checksums"] = np.array([*sums, 0], "<u4").tobytes()
    except FileError:
        pass  # the lie is in the metadata and found before any checksum of a part
    header = header_bytes(text, {blob: len(part) for blob, part in parts.items()})
    return sealed(header, body + parts["checksums"])


def read_all(file: PackedFile) -> None:
    for error in file.check():
        raise error
    for name in file.sites:
        file.tensor(name)


def refuse(data: bytes, kind: type[FileError], text: str) -> None:
    """Asserts that opening or decoding raises this class of error, with one line that holds the text."""
    with pytest.raises(kind, match=text) as caught, PackedFile.from_bytes(data) as file:
        read_all(file)
    assert "\n" not in str(caught.value)


def header(text: bytes) -> bytes:
    text += b" " * (-len(text) % 8)
    good = small()
    size = struct.unpack("<Q", good[:8])[0]
    return sealed(struct.pack("<Q", len(text)) + text, good[8 + size :])


def good_header() -> dict[str, Any]:
    size = struct.unpack("<Q", small()[:8])[0]
    found: dict[str, Any] = json.loads(small()[8 : 8 + size])
    return found


def spoilt(**changes: Any) -> bytes:
    changed = {**good_header(), **changes}
    return header(json.dumps({k: v for k, v in changed.items() if v is not None}, separators=(",", ":")).encode())
