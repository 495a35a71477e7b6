"""Lies in the metadata: each is found before a byte of the data is read, and named."""

from __future__ import annotations

from typing import Any

import pytest

from compressor.formats.errors import FormatError, UnsupportedError
from compressor.formats.file.reader import PackedFile
from tests.helpers.forging import Fields, forged, refuse


def lie(fault: str, kind: type[FormatError | UnsupportedError] = FormatError, **changes: Any) -> None:
    """Change top-level fields and demand the error."""
    refuse(forged(lambda fields: fields.update(changes)), kind, fault)


def site(fault: str, *record: Any, kind: type[FormatError | UnsupportedError] = FormatError) -> None:
    """Replace fields of the first site, from the left; None keeps one."""

    def edit(fields: Fields) -> None:
        old = fields["sites"][0]
        changed = [old[n] if n < len(old) and value is None else value for n, value in enumerate(record)]
        fields["sites"][0] = changed + old[len(changed) :]

    refuse(forged(edit), kind, fault)


@pytest.mark.parametrize("version", [0, -1, "1", 1.0, True, None, [1]])
def test_version_that_is_none(version: Any) -> None:
    lie("version", version=version)


def test_newer_version() -> None:
    lie("format version 3.*upgrade", UnsupportedError, version=3)


def test_unknown_required_feature() -> None:
    lie("needs the codec 'lzma', unknown to this release: upgrade", UnsupportedError, requires=["bits", "lzma"])


@pytest.mark.parametrize("requires", ["bits", [1], None, {"bits": 1}])
def test_requires_that_is_no_list(requires: Any) -> None:
    lie("requires", requires=requires)


@pytest.mark.parametrize("requires", [[], ["bits", "huffman"], ["bits", "bits"]])
def test_requires_other_than_used(requires: list[str]) -> None:
    lie("but the sites use", requires=requires)


def test_unknown_key() -> None:
    lie("unknown key 'extra'", extra=1)


@pytest.mark.parametrize("key", ["model", "preprocessing", "recipe", "provenance"])
@pytest.mark.parametrize("value", [[], {}, 1, "resnet18", None])
def test_objects(key: str, value: Any) -> None:
    refuse(forged(lambda fields: fields.update({key: value})), FormatError, key)


@pytest.mark.parametrize("key", ["books", "sites", "untouched"])
def test_lists(key: str) -> None:
    refuse(forged(lambda fields: fields.update({key: {}})), FormatError, key)


def test_metadata_that_is_no_object() -> None:
    from compressor.formats.file.metadata import parse_metadata

    with pytest.raises(FormatError, match="JSON object"):
        parse_metadata([], 0)


# -- sites


def test_unknown_codec() -> None:
    site("no codec 'bitz'. Did you mean 'bits'", None, None, None, "bitz", kind=UnsupportedError)


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "a\nb",
        "a\x00",
        "\x1b[31mred",
        "__metadata__",
        "x" * 513,
        "a\u200eb",
        "a\u00a0b",
        "\ud800",
        1,
        None,
    ],
)
def test_names(name: Any) -> None:
    def edit(fields: Fields) -> None:
        fields["sites"][0][0] = name

    refuse(forged(edit), FormatError, "tensor name")


def test_name_given_twice() -> None:
    site("'head.weight' given twice", "head.weight")


def test_name_of_an_untouched_tensor() -> None:
    site("'norm.weight' given twice", "norm.weight")


@pytest.mark.parametrize("book", [-1, 3, 0.0, "0", True])
def test_codebook_that_is_absent(book: Any) -> None:
    site("codebook of tensor", None, None, book)


def test_codebook_of_nobody() -> None:
    site("codebook 0 is used by no tensor", None, None, 1)


@pytest.mark.parametrize("size", [14, 16, -1, "15", 15.0])
def test_bytes_of_a_site(size: Any) -> None:
    site("bytes", None, None, None, None, size)


def test_axes_of_a_shape() -> None:
    with PackedFile.from_bytes(
        forged(lambda fields: fields["sites"][0].__setitem__(1, [4, 1, 1, 1, 1, 1, 1, 10]))
    ) as file:
        assert file.tensor("fc.weight").shape == (4, 1, 1, 1, 1, 1, 1, 10)
    site(r"shape of tensor 'fc.weight' is \[4, 1, .*, expected a list of at most 8 sizes", None, [4, *[1] * 7, 10])


def test_record_of_another_length() -> None:
    lie("site .* expected", sites=[["fc.weight", [4, 10], 0, "bits"]])


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({}, "options"),
        ([], "options"),
        ({"bits": 4}, "options"),
        ({"dtype": "F64"}, "dtype"),
        ({"dtype": ["F16"]}, "dtype"),
        ({"axis": 2}, "axis"),
        ({"axis": -1}, "axis"),
        ({"block": 0}, "block"),
        ({"block": 4, "axis": 0}, "both axis and block"),
        ({"vector_axis": 1}, "scalars"),
        ({"scale": "F8_E4M3"}, "scale"),
        ({"scale": "F16", "offset": "F32"}, "two dtypes"),
        ({"axis": 0, "scale": "F32"}, "bytes of data, expected 83 by the metadata"),
    ],
)
def test_options(options: Any, fault: str) -> None:
    site(fault, None, None, None, None, None, options)


# -- codebooks


@pytest.mark.parametrize(
    ("book", "fault"),
    [
        ([], "codebook 0"),
        ("F32", "codebook 0"),
        (["F32"], "codebook 0"),
        (["F64", 5], "dtype of codebook 0"),
        (["F32", 0], "size of codebook 0"),
        (["F32", 5.0], "size of codebook 0"),
        (["F32", [1, 5, 1]], "K alone"),
        (["F32", [5]], "shape"),
        (["F32", [2, 5, 1]], "2 books for 1 groups"),
        (["F32", 5, "signed"], "after the shape"),
        (["F32", 5, "mirrored", 1], "after the shape"),
        (["F32", 5, "mirrored"], "hold at most"),
        (["F32", 6], "bytes of data, expected 71 by the metadata"),
        (["F32", 1 << 30], "takes at most"),
        (["grid", 0, 1], "expected"),
        (["grid", "0", 1, 5], "expected"),
        (["grid", 0, True, 5], "expected"),
        (["grid", 0, 1, 0], "count"),
        (["grid", 0, 1, 65_537], "count"),
        (["grid", 0, 0, 5], "step"),
        (["grid", 0, -1, 5], "step"),
        (["grid", 0, 1e38, 5], "not finite"),
        (["grid", 10**400, 1, 5], "not finite"),
    ],
)
def test_books(book: Any, fault: str) -> None:
    refuse(forged(lambda fields: fields["books"].__setitem__(0, book)), FormatError, fault)


# -- untouched tensors and aliases


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        (["F32", [2]], "untouched"),
        (["F32", [2], ["norm.weight"]], "untouched"),
        (["F32", [2], "norm.weight  b"], "tensor name"),
        (["F32", [2], "norm.weight norm.weight"], "given twice"),
        (["F32", [2], "fc.weight"], "given twice"),
        (["C64", [2], "norm.weight"], "dtype"),
        (["F32", [3], "norm.weight"], "bytes of data, expected 75 by the metadata"),
        (["F32", [2], "norm.weight", "F32"], "its own dtype"),
        (["F32", [2], "norm.weight", "I8"], "stored dtype"),
        (["I32", [2], "norm.weight", "F16"], "dtype"),
        (["F32", [1 << 40, 0], "norm.weight"], "size in the shape"),
    ],
)
def test_untouched(record: Any, fault: str) -> None:
    refuse(forged(lambda fields: fields["untouched"].__setitem__(0, record)), FormatError, fault)


@pytest.mark.parametrize(
    ("aliases", "fault"),
    [
        ([], "not an object"),
        ({"fc.weight": "head.weight"}, "given twice"),
        ({"a": "absent"}, "stands for 'absent'"),
        ({"a": ["fc.weight"]}, "stands for"),
        ({"a": "b", "b": "fc.weight"}, "stands for 'b'"),
        ({"a b": "fc.weight"}, "tensor name"),
    ],
)
def test_aliases(aliases: Any, fault: str) -> None:
    lie(fault, aliases=aliases)
