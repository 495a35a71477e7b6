"""Lies in what stands before the parts of a file of version 2: its header, its sizes, its deflated metadata."""

from __future__ import annotations

import json
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest

from compressor.formats.content import Content
from compressor.formats.errors import FormatError, IntegrityError, UnsupportedError, UsageError
from compressor.formats.file.container import KEY, framed
from compressor.formats.file.deflate import DICTIONARY
from compressor.formats.file.opening import TENSOR
from compressor.formats.file.reader import PackedFile
from compressor.formats.file.writer import pack
from tests.helpers.forging import assembled, deflated, forged, forged_from, head, refuse, small, split, text_of


def with_header(**changes: Any) -> bytes:
    """Replaces fields of the header; the checksum is that of the old one."""
    header, end = head(small())
    changed = {key: value for key, value in {**header, **changes}.items() if value is not None}
    return framed(changed) + small()[end:]


def with_metadata(stream: bytes, size: int | None = None) -> bytes:
    """Replaces the deflated metadata, and the size that they are said to have."""
    return assembled(text_of(small()), b"".join(split(small())[1].values()), stream, size)


# -- the header


@pytest.mark.parametrize("version", ["3", "17", "999999999"])
def test_newer_version(version: str) -> None:
    refuse(with_header(__metadata__={KEY: version}), UnsupportedError, f"format version {version}, .* upgrade")


@pytest.mark.parametrize("version", ["", "0", "-1", "2.0", " 2", "two", "9" * 10, "\u0662", "[1]"])
def test_version_that_is_none(version: str) -> None:
    refuse(with_header(__metadata__={KEY: version}), FormatError, "expected the version of the format")


@pytest.mark.parametrize(
    "entry", [None, "x", [], {}, {"shape": 3}, {"shape": [1, 2]}, {"shape": ["1"]}, {"shape": [True]}]
)
def test_no_tensor_of_bytes(entry: Any) -> None:
    refuse(with_header(**{TENSOR: entry}), FormatError, "no tensor 'packed-v2'")


def test_sizes_of_the_tensor() -> None:
    count = head(small())[0][TENSOR]["shape"][0]
    for size, fault in ((count + 1, "ends 1 bytes early"), (count - 1, "1 bytes after the end"), (1 << 70, "early")):
        refuse(with_header(**{TENSOR: {"shape": [size]}}), FormatError, fault)


@pytest.mark.parametrize("change", [{"dtype": "I8"}, {"data_offsets": [1, 2]}, {"data_offsets": None}, {"extra": 1}])
def test_fields_of_the_tensor(change: dict[str, Any]) -> None:
    entry = {**head(small())[0][TENSOR], **change}
    refuse(with_header(**{TENSOR: entry}), FormatError, "header: not in canonical form")


def test_other_fields_and_keys() -> None:
    refuse(with_header(extra={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}), FormatError, "canonical form")
    refuse(with_header(__metadata__={KEY: "2", "format": "pt"}), FormatError, "canonical form")


def test_order_and_padding() -> None:
    header, end = head(small())
    refuse(framed(dict(reversed(header.items()))) + small()[end:], FormatError, "canonical form")
    spaced = json.dumps(header).encode()
    spaced += b" " * (-len(spaced) % 8)
    refuse(len(spaced).to_bytes(8, "little") + spaced + small()[end:], FormatError, "canonical form")


def test_a_reader_of_version_1_refuses_it_and_names_the_version() -> None:
    """Such a reader names the first field of the header that it does not know."""
    unknown = sorted({*head(small())[0]} - {"__metadata__", "indices", "codebooks", "untouched", "checksums"})
    assert unknown == ["packed-v2"]


# -- the deflated metadata


@pytest.mark.parametrize("size", [0, 1, 8, 11])
def test_too_short_for_metadata(size: int) -> None:
    count = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    refuse(framed({"__metadata__": {KEY: "2"}, TENSOR: count}) + bytes(size), FormatError, "too few for the metadata")


def test_more_metadata_than_the_file_has() -> None:
    data = bytearray(small())
    start = head(small())[1]
    data[start + 4 : start + 8] = (len(data) - start - 11).to_bytes(4, "little")
    refuse(bytes(data), FormatError, "metadata of .* bytes in a file of")


def test_flipped_metadata() -> None:
    data = bytearray(small())
    data[head(small())[1] + 20] ^= 1
    refuse(bytes(data), IntegrityError, "checksum of the header")


@pytest.mark.parametrize("stream", [b"", b"\x07", b"\xff" * 40, zlib.compress(text_of(small()))])
def test_no_deflate_stream(stream: bytes) -> None:
    refuse(with_metadata(stream), FormatError, "metadata: (not a deflate stream|the deflate stream does not hold)")


def test_streams_of_another_size() -> None:
    text, stream = text_of(small()), deflated(text_of(small()))
    for lie, size in (
        (stream, len(text) - 1), (stream, len(text) + 1), (stream, 0), (stream[:-1], len(text)),
        (stream + b"\0", len(text)), (deflated(text + b" "), len(text)), (deflated(b""), len(text)),
    ):  # fmt: skip
        refuse(with_metadata(lie, size), FormatError, "does not hold exactly|not a deflate stream")


def test_a_deflate_bomb_is_refused_unopened() -> None:
    """16 MB of spaces in 16 KB: the size declared is too large, or a lie, and no more than it is ever inflated."""
    stream = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=DICTIONARY)
    bomb = stream.compress(b" " * (1 << 24)) + stream.flush()
    honest, lying = with_metadata(bomb, 1 << 24), with_metadata(bomb, 1_000)
    tracemalloc.start()
    refuse(honest, FormatError, "metadata of 16,777,216 bytes deflated to .*, expected at most")
    refuse(lying, FormatError, "does not hold exactly the 1,000 bytes")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_metadata_that_a_reader_would_refuse_are_not_written() -> None:
    with pytest.raises(UsageError, match=r"metadata of .* expected at most"):
        pack(Content({}, (), provenance={"note": "x" * 400_000}))
    random = np.random.default_rng(0).integers(97, 122, 400_000).astype(np.uint8).tobytes().decode()
    with PackedFile.from_bytes(pack(Content({}, (), provenance={"note": random[:30_000]}))) as file:
        assert file.provenance["note"] == random[:30_000]


@pytest.mark.parametrize(
    "text", [b"[]", b"{", b'{"version":NaN}', b"[" * 5_000, b'{"version":1,"version":1}', b"\xff", b""]
)
def test_metadata_that_are_none(text: bytes) -> None:
    refuse(assembled(text, b""), FormatError, "metadata")


@pytest.mark.parametrize(("of", "stated"), [(1, 2), (2, 1)])
def test_version_of_the_other_container(of: int, stated: int) -> None:
    data = small(version=1) if of == 1 else pack(Content({}, ()))
    edited = forged_from(data, lambda fields: fields.update(version=stated, requires=fields["requires"]))
    refuse(edited, FormatError, f"metadata: version {stated} in a file of {of}|data, expected|blob")


# -- what only version 2 has


@pytest.mark.parametrize(
    ("book", "fault"),
    [
        (["steps", 0, 0.5], "expected"),
        (["steps", 0.0, 0.5, 4], "least number of steps"),
        (["steps", 1 << 31, 0.5, 4], "least number of steps"),
        (["steps", 0, 1, 4], "expected"),
        (["steps", 0, 0.5, 0], "count"),
        (["steps", 0, 0.5, 65_537], "count"),
        (["steps", 0, 0.10000000149011612, 4], "fewest digits"),
        (["steps", 0, 0.0, 4], "step"),
        (["steps", 0, -0.5, 4], "step"),
        (["steps", 0, 1e39, 4], "fewest digits|not finite"),
        (["steps", 1 << 30, 1e38, 4], "not finite"),
    ],
)
def test_steps(book: list[Any], fault: str) -> None:
    refuse(forged(lambda fields: fields["books"].__setitem__(1, book)), FormatError, fault)


def test_a_grid_of_one_tenth_is_read_as_float32() -> None:
    with PackedFile.from_bytes(forged(lambda fields: fields["books"].__setitem__(1, ["steps", -1, 0.1, 4]))) as file:
        assert file.book(1).expand().ravel().tolist() == [np.float32(k * float(np.float32(0.1))) for k in (-1, 0, 1, 2)]


@pytest.mark.parametrize(
    ("name", "shape", "fault"),
    [
        ("a.bias b.bias", [6], "a stack of 2 tensors"),
        ("a.bias b.bias", [3, 2], "a stack of 2 tensors"),
        ("a.bias b.bias", [], "a stack of 2 tensors"),
        ("a.bias b.bias c.bias", [2, 3], "a stack of 3 tensors"),
        ("a.bias  b.bias", [2, 3], "tensor name"),
        ("a.bias a.bias", [2, 3], "'a.bias' given twice"),
        ("a.bias fc.weight", [2, 3], "'fc.weight' given twice"),
        ("a.bias norm.count", [2, 3], "'norm.count' given twice"),
        ("a.bias tied.weight", [2, 3], "'tied.weight' given twice"),
    ],
)
def test_stacks(name: str, shape: list[int], fault: str) -> None:
    def edit(fields: dict[str, Any]) -> None:
        fields["sites"][2][:2] = [name, shape]

    refuse(forged(edit), FormatError, fault)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("I64", 0.0), ("I64", 1 << 63), ("U8", -1), ("U8", 256), ("BOOL", 2), ("BOOL", True), ("F32", 1), ("F32", 0.1),
        ("F32", 1e39), ("F16", 1e5), ("F16", 1.0001), ("BF16", 1.001), ("F8_E4M3", 1.0), ("F32", None), ("F32", [1.0]),
    ],
)  # fmt: skip
def test_values(dtype: str, value: Any) -> None:
    entry = [dtype, [], "norm.count", value]
    refuse(forged(lambda fields: fields["untouched"].__setitem__(1, entry)), FormatError, "'norm.count'")


@pytest.mark.parametrize(
    ("key", "entry", "fault"),
    [
        ("books", ["steps", 0, 0.5, 4], "dtype of codebook 1"),
        ("sites", ["head.weight b.weight", [2, 3], 1, "bits", 2], "tensor name"),
        ("untouched", ["I64", [], "norm.count", 0], "stored dtype"),
    ],
)
def test_version_1_has_none_of_it(key: str, entry: list[Any], fault: str) -> None:
    data = small(version=1)
    refuse(forged_from(data, lambda fields: fields[key].__setitem__(1, entry)), FormatError, fault)


def test_giant_constants_are_refused_without_memory() -> None:
    data = forged(lambda fields: fields["untouched"].__setitem__(1, ["I64", [1 << 30, 1 << 20], "norm.count", 0]))
    tracemalloc.start()
    refuse(data, FormatError, r"more than the .* allowed \(max_memory\)")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
