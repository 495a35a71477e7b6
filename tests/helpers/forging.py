"""A small packed file, and functions that make one thing in it wrong while all checksums stay right."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

from compressor.formats.codecs.registry import CODECS
from compressor.formats.content import Content, Grid, RawTensor, SharedTensor, Table
from compressor.formats.dtypes import from_storage, to_storage
from compressor.formats.errors import FileError
from compressor.formats.file.container import BLOBS, KEY, canonical_json, framed, header_bytes
from compressor.formats.file.deflate import DICTIONARY
from compressor.formats.file.layout import layout, sections
from compressor.formats.file.metadata import parse_metadata
from compressor.formats.file.opening import TENSOR
from compressor.formats.file.reader import PackedFile
from compressor.formats.file.writer import pack
from tests.formats.codecs.test_contract import sample

Fields = dict[str, Any]


@cache
def small(codec_id: str = "bits", version: int = 2) -> bytes:
    """Packs a file that has one of everything, in under 2 KB."""
    codec = CODECS[codec_id]()
    site = SharedTensor((4, 10), 0, sample(codec_id, 40, 5, 0), codec=codec)
    scaled = SharedTensor((6,), 1, np.array([0, 1, 2, 3, 0, 1], np.uint8), "F16", block=3, scale=np.ones(2, np.float32))
    raw = RawTensor("F32", (2,), np.array([1, 0.5], np.float32).tobytes(), "F16")
    stack = {"a.bias b.bias": SharedTensor((2, 3), 2, np.array([0, 1, 2, 2, 1, 0], np.uint8))} if version > 1 else {}
    data = pack(
        Content(
            {"fc.weight": site, "head.weight": scaled, **stack},
            (Table.of([-1.0, 0.0, 0.5, 1.0, 2.0]), Grid(0.0, 0.5, 4), Table.of([0.0, 1.0, 3.0]))[: 2 + len(stack)],
            {"norm.weight": raw, "norm.count": RawTensor("I64", (), bytes(8))}, {"tied.weight": "fc.weight"},
            {"name": "test_resnet", "args": {}}, provenance={"seed": 0},
        ),
        "bits",
    )  # fmt: skip
    return data if version > 1 else as_version_1(data)


def head(data: bytes) -> tuple[Fields, int]:
    """Returns the JSON of the safetensors header, and where it ends."""
    size = struct.unpack("<Q", data[:8])[0]
    found: Fields = json.loads(data[8 : 8 + size])
    return found, 8 + size


def deflated(text: bytes) -> bytes:
    """Deflates metadata by zlib."""
    stream = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=DICTIONARY)
    return stream.compress(text) + stream.flush()


def text_of(data: bytes) -> bytes:
    """Returns the metadata of a good file."""
    header, start = head(data)
    if TENSOR not in header:
        text: str = header["__metadata__"][KEY]
        return text.encode()
    size = struct.unpack_from("<I", data, start + 4)[0]
    return zlib.decompressobj(-15, zdict=DICTIONARY).decompress(data[start + 8 : start + 8 + size])


def split(data: bytes) -> tuple[Fields, dict[str, bytes]]:
    """Returns the metadata and the blobs of a good file; in version 2, its parts of each kind."""
    header, start = head(data)
    fields: Fields = json.loads(text_of(data))
    blobs = {}
    if TENSOR not in header:
        for blob in BLOBS:
            begin, end = header[blob]["data_offsets"]
            blobs[blob] = data[start + begin : start + end]
        return fields, blobs
    at = start + 12 + struct.unpack_from("<I", data, start + 4)[0]
    parts = layout(parse_metadata(fields, 1 << 40)).values()
    for blob in BLOBS[:3]:
        size = sum(part.size for part in parts if part.blob == blob)
        blobs[blob], at = data[at : at + size], at + size
    return fields, {**blobs, "checksums": data[at:]}


def sealed(header: bytes, data: bytes) -> bytes:
    """Joins header and data of a file of version 1 under the right checksum of the header."""
    return header + data[:-4] + struct.pack("<I", zlib.crc32(header))


def assembled(text: bytes, data: bytes, stream: bytes | None = None, size: int | None = None) -> bytes:
    """Joins metadata and data in a file of version 2, all around them right; stream and declared size may lie."""
    stream = deflated(text) if stream is None else stream
    metadata = struct.pack("<II", len(text) if size is None else size, len(stream)) + stream
    count = len(metadata) + 4 + len(data)
    tensor = {"dtype": "U8", "shape": [count], "data_offsets": [0, count]}
    opening = framed({"__metadata__": {KEY: "2"}, TENSOR: tensor}) + metadata
    return opening + struct.pack("<I", zlib.crc32(opening)) + data


def forged(edit: Callable[[Fields], object] = lambda fields: None, blobs: dict[str, bytes] | None = None) -> bytes:
    """Edits the small file and recomputes all checksums, so that only the edit is at fault."""
    return forged_from(small(), edit, blobs)


def forged_from(data: bytes, edit: Callable[[Fields], object], blobs: dict[str, bytes] | None = None) -> bytes:
    """Edits a good file and recomputes all checksums."""
    version_1 = TENSOR not in head(data)[0]
    fields, parts = split(data)
    edit(fields)
    parts.update(blobs or {})
    body = b"".join(parts[blob] for blob in BLOBS[:3])
    text = canonical_json(fields)
    try:
        found = sections(layout(parse_metadata(json.loads(text), 1 << 40)))
        sums = [zlib.crc32(body[one.start : one.start + one.size]) for one in found]
        parts["checksums"] = np.array([*sums, 0][: len(sums) + version_1], "<u4").tobytes()
    except FileError:
        pass  # the lie is in the metadata and found before any checksum of a part
    if not version_1:
        return assembled(text.encode(), body + parts["checksums"])
    return joined_1(text, parts)


def as_version_1(data: bytes) -> bytes:
    """Returns a file of version 1 with the content of one of version 2 that has no stacks."""
    with PackedFile.from_bytes(data) as file:
        fields, blobs = split(data)
        fields["version"] = 1
        grids = {place: book for place, book in enumerate(file.books) if isinstance(book, Grid)}
        for place, grid in grids.items():
            fields["books"][place] = ["grid", float(grid.start), float(grid.step), grid.count]
        raws, untouched = [], b""
        for entry in fields.get("untouched", []):
            constant = len(entry) == 4 and not isinstance(entry[3], str)
            raws.append(entry[:3] if constant else entry)
            for name in entry[2].split(" "):
                raw = file.raw(name)
                untouched += (
                    raw.data
                    if raw.stored in ("", raw.dtype)
                    else to_storage(from_storage(raw.data, raw.dtype), raw.stored)
                )
        if raws:
            fields["untouched"] = raws
    blobs["untouched"] = untouched
    return forged_from(joined_1(canonical_json(fields), {**blobs, "checksums": bytes(4)}), lambda _: None)


def joined_1(text: str, blobs: dict[str, bytes]) -> bytes:
    """Joins metadata and blobs in a file of version 1 under the right checksum of the header."""
    header = header_bytes(text, {blob: len(part) for blob, part in blobs.items()})
    return sealed(header, b"".join(blobs[blob] for blob in BLOBS))


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
    """Puts any text in place of the header of the small file of version 1."""
    text += b" " * (-len(text) % 8)
    good = small(version=1)
    return sealed(struct.pack("<Q", len(text)) + text, good[head(good)[1] :])


def good_header() -> dict[str, Any]:
    return head(small(version=1))[0]


def spoilt(**changes: Any) -> bytes:
    changed = {**good_header(), **changes}
    return header(json.dumps({k: v for k, v in changed.items() if v is not None}, separators=(",", ":")).encode())
