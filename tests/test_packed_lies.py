"""Every way a packed file can lie has a test: the error's class, and what its one line says."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from test_codec_contract import sample

from compressor.formats.codec import CODECS
from compressor.formats.container import BLOBS, KEY, canonical_json, header_bytes
from compressor.formats.errors import FileError, FormatError, IntegrityError, MissingError, UnsupportedError
from compressor.formats.layout import layout
from compressor.formats.metadata import parse_metadata
from compressor.formats.packed import pack
from compressor.formats.reader import PackedFile
from compressor.formats.record import Content, Grid, RawTensor, SharedTensor, Table

Fields = dict[str, Any]


def small(codec_id: str = "bits") -> bytes:
    """Pack a file that has one of everything, in under 2 KB."""
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
    """Give the metadata and the blobs of a file."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    blobs = {}
    for blob in BLOBS:
        start, end = header[blob]["data_offsets"]
        blobs[blob] = data[8 + size + start : 8 + size + end]
    return json.loads(header["__metadata__"][KEY]), blobs


def sealed(header: bytes, data: bytes) -> bytes:
    """Join header and data, the header's checksum made right."""
    return header + data[:-4] + struct.pack("<I", zlib.crc32(header))


def forged(edit: Callable[[Fields], object] = lambda fields: None, blobs: dict[str, bytes] | None = None) -> bytes:
    """Change the small file, then make all checksums right again: nothing but the lie is at fault."""
    return forged_from(small(), edit, blobs)


def forged_from(data: bytes, edit: Callable[[Fields], object], blobs: dict[str, bytes] | None = None) -> bytes:
    """Change a good file, then make all checksums right again."""
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
    """Demand one clear line, of the right class, at opening or at decoding."""
    with pytest.raises(kind, match=text) as caught, PackedFile.from_bytes(data) as file:
        read_all(file)
    assert "\n" not in str(caught.value)


def test_the_good_file_is_good() -> None:
    assert forged() == small()
    with PackedFile.from_bytes(small()) as file:
        assert file.check() == []


# -- the file as a whole


@pytest.mark.parametrize("codec_id", sorted(CODECS))
def test_truncated_at_any_byte(codec_id: str) -> None:
    data = small(codec_id)
    for size in range(len(data)):
        with pytest.raises(FormatError):
            PackedFile.from_bytes(data[:size])


def test_truncated_says_how_much_is_missing() -> None:
    refuse(small()[:-10], FormatError, r"ends 10 bytes early.*incomplete download")


def test_trailing_bytes_say_how_many() -> None:
    refuse(small() + b"PK\x03\x04 zip", FormatError, "8 bytes after the end")


@pytest.mark.parametrize("codec_id", sorted(CODECS))
def test_every_flipped_bit_is_found(codec_id: str) -> None:
    data = small(codec_id)
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            try:
                with PackedFile.from_bytes(bytes(flipped)) as file:
                    found = file.check()
            except FileError as error:
                found = [error]
            assert found, f"bit {bit} of byte {position}"


def test_a_flipped_bit_names_the_part() -> None:
    _, blobs = split(small())
    start = len(small()) - sum(map(len, blobs.values()))
    for blob, name in {
        "indices": r"indices of 'fc\.weight'",
        "codebooks": "codebook 0",
        "untouched": "untouched of",
    }.items():
        flipped = bytearray(small())
        flipped[start + sum(len(blobs[b]) for b in BLOBS[: BLOBS.index(blob)])] ^= 1
        refuse(bytes(flipped), IntegrityError, f"checksum of the {name}")


def test_check_lists_every_bad_part() -> None:
    _, blobs = split(small())
    body = b"".join(bytes(len(blobs[blob])) for blob in BLOBS[:3])
    data = small()[: -len(body + blobs["checksums"])] + body + blobs["checksums"]
    with PackedFile.from_bytes(data) as file:
        assert len(file.check()) >= 4


@pytest.mark.parametrize("data", [b"", b"\0", bytes(7)])
def test_too_short(data: bytes) -> None:
    refuse(data, FormatError, "too short")


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, (16 << 20) + 1, 5000])
def test_header_longer_than_the_file(length: int) -> None:
    refuse(struct.pack("<Q", length) + small()[8:], FormatError, "header of")


# -- other kinds of files


def test_plain_safetensors() -> None:
    data = safetensors.torch.save({"fc.weight": torch.zeros(2, 2)}, {"format": "pt"})
    refuse(data, UnsupportedError, "plain safetensors file.*compress pack MODEL")


@pytest.mark.parametrize(
    ("start", "kind"), [(b"PK\x03\x04", "zip archive"), (b"\x80\x02}q", "pickle"), (b"GGUF\x03", "GGUF")]
)
def test_other_kinds(start: bytes, kind: str) -> None:
    refuse(start + bytes(100), UnsupportedError, kind)


def test_header_lengths_that_look_like_a_pickle() -> None:
    """A header of 640 or 1,152 bytes begins with the first bytes of a pickle."""
    for padding in range(1, 1200, 8):
        data = pack(Content({}, (), provenance={"note": "x" * padding}))
        with PackedFile.from_bytes(data) as file:
            assert file.check() == []


@pytest.mark.parametrize("legacy", [False, True])
def test_checkpoints_of_torch_are_never_unpickled(tmp_path: Path, legacy: bool) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
            return (tmp_path / "executed").touch, ()

    path = tmp_path / "model.pth"
    torch.save({"fc.weight": Hostile()}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UnsupportedError, match=r"\.pth checkpoint.*compress pack MODEL"):
        PackedFile.open(path)
    assert not (tmp_path / "executed").exists()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no such file"):
        PackedFile.open(tmp_path / "absent.safetensors")


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="a folder"):
        PackedFile.open(tmp_path)


def test_fifo_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(FormatError, match="not a regular file"):
        PackedFile.open(tmp_path / "fifo")


def test_device() -> None:
    with pytest.raises(FormatError, match="not a regular file"):
        PackedFile.open("/dev/zero")


# -- the safetensors header


def header(text: bytes) -> bytes:
    text += b" " * (-len(text) % 8)
    good = small()
    size = struct.unpack("<Q", good[:8])[0]
    return sealed(struct.pack("<Q", len(text)) + text, good[8 + size :])


def good_header() -> dict[str, Any]:
    size = struct.unpack("<Q", small()[:8])[0]
    found: dict[str, Any] = json.loads(small()[8 : 8 + size])
    return found


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (b"\xff\xfe{}", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "expected a JSON object"),
        (b'{"a":NaN}', "NaN is not a number"),
        (b'{"a":-Infinity}', "-Infinity is not a number"),
        (b'{"a":1,"a":1}', "'a' given twice"),
        (b'{"a":' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * 40 + b"]" * 40, "nested too deeply"),
        (b'{"__metadata__":{"timm-compressor":1}}', "not a string"),
        (b'{"a":1}', "no metadata"),
    ],
)
def test_bad_header_text(text: bytes, fault: str) -> None:
    refuse(header(text), FormatError, fault)


def spoilt(**changes: Any) -> bytes:
    changed = {**good_header(), **changes}
    return header(json.dumps({k: v for k, v in changed.items() if v is not None}, separators=(",", ":")).encode())


def test_unknown_header_field() -> None:
    refuse(spoilt(extra={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}), FormatError, "unknown field 'extra'")


def test_second_metadata_key() -> None:
    notes = {**good_header()["__metadata__"], "format": "pt"}
    refuse(spoilt(__metadata__=notes), FormatError, "unknown field 'format'")


def test_missing_blob() -> None:
    refuse(spoilt(codebooks=None), FormatError, "no tensor 'codebooks'")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "U8", "shape": [10], "data_offsets": [1, 11]},
        {"dtype": "U8", "shape": [10], "data_offsets": [0, -10]},
        {"dtype": "U8", "shape": [10], "data_offsets": [10, 0]},
        {"dtype": "U8", "shape": [9], "data_offsets": [0, 10]},
        {"dtype": "I8", "shape": [10], "data_offsets": [0, 10]},
        {"dtype": "U8", "shape": [10], "data_offsets": [0, 10.0]},
        {"dtype": "U8", "shape": [10], "data_offsets": [0]},
        {"dtype": "U8", "shape": [10], "data_offsets": [0, 1 << 70]},
        {"dtype": "U8", "shape": [10], "data_offsets": [False, 10]},
        "indices",
    ],
)
def test_bad_blob_entry(entry: Any) -> None:
    refuse(spoilt(indices=entry), FormatError, "header: tensor")


def test_header_in_another_order_is_refused() -> None:
    reordered = dict(reversed(good_header().items()))
    refuse(header(json.dumps(reordered, separators=(",", ":")).encode()), FormatError, "canonical form")


def test_flipped_header_that_still_parses() -> None:
    data = bytearray(small())
    data[data.index(b"seed")] ^= 1
    refuse(bytes(data), IntegrityError, "checksum of the header")
