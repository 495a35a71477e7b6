"""Every way a packed file can lie has a test: the error's class, and what its one line says."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from compressor.formats.codecs.registry import CODECS
from compressor.formats.content import Content, SharedTensor, Table
from compressor.formats.errors import FileError, FormatError, IntegrityError, MissingError, UnsupportedError
from compressor.formats.file.container import BLOBS
from compressor.formats.file.reader import PackedFile
from compressor.formats.file.writer import pack
from tests.formats.file.test_golden import tensors
from tests.helpers import slow_reader
from tests.helpers.forging import forged_from, good_header, header, refuse, small, split, spoilt

SECTIONS = (60_000, 5_536, 65_536, 10)  # bytes of parts; 64 KiB end a section


@pytest.mark.parametrize("version", [1, 2])
def test_the_good_file_is_good(version: int) -> None:
    for data in (small(version=version), forged_from(small(version=version), lambda _: None)):
        with PackedFile.from_bytes(data) as file:
            assert file.check() == []
            assert file.metadata["version"] == version
            assert tensors(file) == slow_reader.read(data)


# -- the file as a whole


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("codec_id", sorted(CODECS))
def test_truncated_at_any_byte(codec_id: str, version: int) -> None:
    data = small(codec_id, version)
    for size in range(len(data)):
        with pytest.raises(FormatError):
            PackedFile.from_bytes(data[:size])


def test_truncated_says_how_much_is_missing() -> None:
    refuse(small()[:-10], FormatError, r"ends 10 bytes early.*incomplete download")


def test_trailing_bytes_say_how_many() -> None:
    refuse(small() + b"PK\x03\x04 zip", FormatError, "8 bytes after the end")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("codec_id", sorted(CODECS))
def test_every_flipped_bit_is_found(codec_id: str, version: int) -> None:
    data = small(codec_id, version)
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
    good = small(version=1)
    _, blobs = split(good)
    start = len(good) - sum(map(len, blobs.values()))
    for blob, name in {
        "indices": r"indices of 'fc\.weight'",
        "codebooks": "codebook 0",
        "untouched": "untouched of",
    }.items():
        flipped = bytearray(good)
        flipped[start + sum(len(blobs[b]) for b in BLOBS[: BLOBS.index(blob)])] ^= 1
        refuse(bytes(flipped), IntegrityError, f"checksum of the {name}")


def test_a_flipped_bit_names_the_section() -> None:
    """Small parts have one checksum together, a large one ends its section."""
    sites = {f"fc{n}.weight": SharedTensor((size,), 0, np.zeros(size, np.uint8)) for n, size in enumerate(SECTIONS)}
    data = pack(Content(sites, (Table.of(range(256)),)), "bits")
    _, blobs = split(data)
    start = len(data) - sum(map(len, blobs.values()))
    assert len(blobs["checksums"]) == 12
    for place, name in {
        0: "indices of 'fc0.weight' to the indices of 'fc1.weight'",
        SECTIONS[0] + SECTIONS[1] - 1: "indices of 'fc0.weight' to the indices of 'fc1.weight'",
        SECTIONS[0] + SECTIONS[1]: "indices of 'fc2.weight'",
        sum(SECTIONS[:3]): "indices of 'fc3.weight' to the codebook 0",
    }.items():
        flipped = bytearray(data)
        flipped[start + place] ^= 1
        refuse(bytes(flipped), IntegrityError, f"checksum of the {name} does not match")


@pytest.mark.parametrize("version", [1, 2])
def test_check_lists_every_bad_part(version: int) -> None:
    good = small(version=version)
    _, blobs = split(good)
    body = b"".join(bytes(len(blobs[blob])) for blob in BLOBS[:3])
    data = good[: -len(body + blobs["checksums"])] + body + blobs["checksums"]
    with PackedFile.from_bytes(data) as file:
        assert len(file.check()) >= 4


@pytest.mark.parametrize("data", [b"\0", bytes(7), b"a text"])
def test_too_short(data: bytes) -> None:
    refuse(data, FormatError, "too short")


def test_an_empty_file_is_called_so() -> None:
    refuse(b"", FormatError, "an empty file")


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


@pytest.mark.parametrize(("blob", "offsets", "start"), [("indices", [1, 11], 0), ("codebooks", [16, 38], 17)])
def test_hole_and_overlap(blob: str, offsets: list[int], start: int) -> None:
    """The shape is right for what lies between the end of one blob and that of the next."""
    entry = {"dtype": "U8", "shape": [offsets[1] - start], "data_offsets": offsets}
    fault = rf"tensor '{blob}' at \[{offsets[0]}, {offsets[1]}\], expected to begin at {start}: hole or overlap"
    refuse(spoilt(**{blob: entry}), FormatError, fault)


def test_header_in_another_order_is_refused() -> None:
    reordered = dict(reversed(good_header().items()))
    refuse(header(json.dumps(reordered, separators=(",", ":")).encode()), FormatError, "canonical form")


def test_flipped_header_that_still_parses() -> None:
    data = bytearray(small(version=1))
    data[data.index(b"seed")] ^= 1
    refuse(bytes(data), IntegrityError, "checksum of the header")
