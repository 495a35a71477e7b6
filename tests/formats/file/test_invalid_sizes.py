"""Shapes and sizes that lie: found by arithmetic, before any memory is asked for."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest

from compressor.formats.errors import FormatError
from compressor.formats.file.reader import PackedFile
from tests.formats.file.test_invalid_metadata import site
from tests.helpers.forging import Fields, forged, refuse


@pytest.mark.parametrize("shape", [[4, -1], [4, 2.5], [True, 40], ["4"], "40", {}, [1] * 9, [1 << 31], None])
def test_shapes(shape: Any) -> None:
    def edit(fields: Fields) -> None:
        fields["sites"][0][1] = shape

    refuse(forged(edit), FormatError, "shape of tensor|size in the shape")


def test_dimension_beyond_31_bits_beside_zero() -> None:
    site("size in the shape", None, [1 << 40, 0])


def test_product_of_dimensions_overflows() -> None:
    site("more than 2..63", None, [1 << 30, 1 << 30, 1 << 30])


def test_giant_count_in_few_bytes() -> None:
    site("declares 1073741824 indices in 15 bytes, which hold at most 40", None, [1 << 30])


def test_giant_files_are_refused_without_memory_or_delay() -> None:
    """One codeword and generated indices take no bytes whatever the count: only max_memory bounds them."""

    def edit(fields: Fields) -> None:
        fields["books"][0] = ["grid", 0.0, 0.0, 1]
        fields["sites"][0][1] = [1 << 30, 1 << 30]

    data = forged(edit)
    tracemalloc.start()
    refuse(data, FormatError, r"more than the .* allowed \(max_memory\)")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_max_memory_is_what_the_caller_says() -> None:
    PackedFile.from_bytes(forged(), max_memory=372)
    with pytest.raises(FormatError, match="max_memory"):
        PackedFile.from_bytes(forged(), max_memory=371)
