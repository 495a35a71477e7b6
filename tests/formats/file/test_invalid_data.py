"""Lies in the data behind right checksums, and content that cannot be written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from compressor.formats.content import Content, Grid, RawTensor, SharedTensor, Table
from compressor.formats.errors import FormatError, UnsupportedError, UsageError
from compressor.formats.file.container import BLOBS
from compressor.formats.file.reader import PackedFile
from compressor.formats.file.writer import pack
from tests.helpers.forging import forged, forged_from, refuse, small, split


def changed(blob: str, start: int, data: bytes) -> bytes:
    """Write ``data`` over a blob of the small file, checksums made right."""
    _, blobs = split(small())
    spoilt = bytearray(blobs[blob])
    spoilt[start : start + len(data)] = data
    return forged(blobs={blob: bytes(spoilt)})


def floats(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_codeword_that_is_not_finite(value: float) -> None:
    refuse(changed("codebooks", 4, floats(value)), FormatError, "codebook 0: codeword 1 is not finite")


def test_codewords_that_do_not_ascend() -> None:
    refuse(changed("codebooks", 4, floats(5.0)), FormatError, "codebook 0: codewords do not ascend")


def test_scale_that_is_not_finite() -> None:
    refuse(changed("codebooks", 36, floats(np.nan)), FormatError, r"scale of 'head\.weight' is not finite")


def test_index_of_no_codeword() -> None:
    refuse(changed("indices", 0, b"\x07"), FormatError, r"'fc\.weight': index 7 at position 0, expected less than 5")


def test_truth_value_of_two() -> None:
    data = bytearray(pack(Content({}, (), {"mask": RawTensor("BOOL", (2,), b"\0\1")})))
    with PackedFile.from_bytes(bytes(data)) as file:
        assert file.raw("mask").data == b"\0\1"
    with pytest.raises(UsageError, match="truth values"):
        pack(Content({}, (), {"mask": RawTensor("BOOL", (2,), b"\0\2")}))


def test_blobs_of_other_sizes() -> None:
    old = small(version=1)
    for blob in BLOBS[:3]:
        _, blobs = split(old)
        longer = forged_from(old, lambda fields: None, {blob: blobs[blob] + b"\0"})
        refuse(longer, FormatError, f"blob '{blob}'")
        _, parts = split(small())
        size = sum(map(len, parts.values()))
        told = f"{size + 1} bytes of data, expected {size} by the metadata"
        refuse(forged(blobs={blob: parts[blob] + b"\0"}), FormatError, told)


@pytest.mark.parametrize(("values", "told"), [([-1e-40, 0, 1e-39], True), ([-1e-40, 1], False), ([0], False)])
def test_codebooks_of_denormals_alone_are_told(
    caplog: pytest.LogCaptureFixture, values: list[float], told: bool
) -> None:
    content = Content({"a": SharedTensor((2,), 0, np.zeros(2, np.uint8))}, (Table.of(values),))
    with PackedFile.from_bytes(pack(content)) as file:
        for _ in range(2):
            assert file.check() == []
    said = "packed bytes: codebook 0: all values are below 1.2e-38 (denormal), which some processors take for 0"
    assert [record.message for record in caplog.records] == [said] * told


def test_denormal_codewords_are_kept() -> None:
    site = SharedTensor((2,), 0, np.array([0, 1], np.uint8))
    book = Table.of([1e-45, 1e-40])
    with PackedFile.from_bytes(pack(Content({"a": site}, (book,)))) as file:
        assert file.tensor("a").tolist() == book.values.reshape(-1).tolist()


# -- the writer refuses what the reader would

SITE = SharedTensor((2, 3), 0, np.array([0, 1, 2, 0, 1, 2], np.uint8))
BOOK = Table.of([-1.0, 0.0, 1.0])
RAW = RawTensor("F32", (2,), floats(1.0, 2.0))


def cannot(fault: str, site: SharedTensor = SITE, book: Any = BOOK, name: str = "fc.weight", **more: Any) -> None:
    with pytest.raises(UsageError, match=fault) as caught:
        pack(Content({name: site}, (book,), **more))
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "a  b", " a", "a\nb", "a\0b", "\x1b[2J", "__metadata__", "x" * 1_000_000])
def test_names_that_cannot_be_written(name: str) -> None:
    cannot("tensor name", name=name)
    cannot("tensor name", untouched={name: RAW})


def test_a_space_in_the_name_of_an_untouched_tensor_cannot_be_written() -> None:
    """In the name of a site it stands between the names of a stack, whose slices must be as many."""
    cannot("tensor name", untouched={"a b": RAW})
    cannot("3 tensors", name="a b c")


def test_indices_that_cannot_be_written() -> None:
    cannot("expected unsigned", replace(SITE, indices=SITE.indices[:5]))
    cannot("expected unsigned", replace(SITE, indices=SITE.indices.astype(np.int64)))
    cannot("index 3 at position 2", replace(SITE, indices=SITE.indices + np.uint8(1)))
    cannot("index 2 at position 2, expected less than 2", book=Table.of([0.0, 1.0]))


def test_sites_that_cannot_be_written() -> None:
    cannot("codebook of 'fc.weight' is 1", replace(SITE, book=1))
    cannot("dtype", replace(SITE, dtype="F64"))
    cannot("axis", replace(SITE, axis=2))
    cannot("vector_axis", replace(SITE, vector_axis=1))
    cannot("scale of 'fc.weight' has 8 bytes, expected 12", replace(SITE, axis=1, scale=np.ones(2, np.float32)))
    cannot("not finite", replace(SITE, scale=np.array([np.nan], np.float32)))
    cannot("does not fit F16", replace(SITE, scale=np.array([1e-9], np.float32), scale_dtype="F16"))


def test_codebooks_that_cannot_be_written() -> None:
    cannot("codeword 2 is not finite", book=Table.of([0.0, 1.0, np.nan]))
    cannot("do not ascend", book=Table(np.array([[[0.0], [1.0], [0.5]]], np.float32)))
    cannot("does not fit BF16", book=Table(np.array([0, 1, 1.001], np.float32).reshape(1, 3, 1), "BF16"))
    cannot("stored as 'F64'", book=Table(BOOK.values, "F64"))
    cannot("not finite", book=Grid(0.0, 1e39, 3))
    with pytest.raises(UsageError, match="codebook 1 is used by no tensor"):
        pack(Content({"fc.weight": SITE}, (BOOK, BOOK)))


def test_untouched_that_cannot_be_written() -> None:
    cannot("untouched of 'bn' has 8 bytes, expected 12", untouched={"bn": RawTensor("F32", (3,), RAW.data)})
    cannot("does not fit F16", untouched={"bn": RawTensor("F32", (1,), floats(1e6), "F16")})
    cannot("I32 stored as F16, expected stored as I32", untouched={"bn": RawTensor("I32", (2,), RAW.data, "F16")})
    cannot("given twice", untouched={"fc.weight": RAW})
    cannot("dtype", untouched={"bn": RawTensor("C64", (1,), RAW.data)})


def test_the_rest_that_cannot_be_written() -> None:
    cannot("stands for 'absent'", aliases={"a": "absent"})
    cannot("given twice", aliases={"fc.weight": "fc.weight"})
    cannot("not JSON", recipe={"a": object()})
    cannot("not JSON", recipe={"a": float("nan")})


def test_unknown_codec_to_write_with() -> None:
    with pytest.raises(UsageError, match="Did you mean 'huffman'"):
        pack(Content({"fc.weight": SITE}, (BOOK,)), "hufman")


def test_too_many_codewords_for_a_codec() -> None:
    site = SharedTensor((2,), 0, np.array([0, 65_535], np.uint16))
    with pytest.raises(UsageError, match="65536 codewords, expected at most 32768 with codec 'huffman'"):
        pack(Content({"a": site}, (Grid(0.0, 1.0, 1 << 16),)), "huffman")


def test_names_of_nothing_are_missing_with_a_hint() -> None:
    from compressor.formats.errors import MissingError

    with PackedFile.from_bytes(small()) as file:
        for read in (file.tensor, file.indices, file.shared, file.site_overhead):
            with pytest.raises(MissingError, match=r"no shared tensor 'fc\.weigt'"):
                read("fc.weigt")
        with pytest.raises(MissingError, match=r"Did you mean 'norm\.weight'"):
            file.raw("norm.weigth")


def test_errors_name_the_file(tmp_path: Any) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(changed("codebooks", 4, floats(np.nan)))
    with PackedFile.open(path) as file, pytest.raises(FormatError, match=r"broken\.safetensors: codebook 0"):
        file.tensor("fc.weight")
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(UnsupportedError, match=r"broken\.safetensors: this is a zip"):
        PackedFile.open(path)
