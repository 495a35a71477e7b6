"""Figures of a small file that can be counted by hand: two tensors of one codebook, and an untouched one.

It is of version 1, whose metadata are text. Of version 2 a tensor's overhead is a share of the deflated metadata.
"""

from __future__ import annotations

import numpy as np
import pytest

from compressor.formats.content import Content, RawTensor, SharedTensor, Table
from compressor.formats.file.reader import PackedFile
from compressor.formats.file.writer import pack
from compressor.report.report import Report
from tests.helpers.forging import as_version_1


@pytest.fixture(scope="module")
def report() -> Report:
    """1,000 weights a tensor of one bit each, and a codebook of two values: 125 bytes a tensor, 8 for both."""
    shared = SharedTensor((10, 100), 0, (np.arange(1000) % 2).astype(np.uint8))
    untouched = {"c": RawTensor("F32", (100,), bytes(400))}
    data = as_version_1(pack(Content({"a": shared, "b": shared}, (Table.of([-0.5, 0.5]),), untouched), codec="bits"))
    assert len(data) == 1166
    with PackedFile.from_bytes(data) as file:
        return Report.of(file)


def test_a_codebook_of_two_tensors_is_divided_between_them(report: Report) -> None:
    assert [row.codebook for row in report.rows] == [4, 4]
    assert report.totals.codebooks == 8


def test_the_ratio_of_a_tensor_counts_its_codebook_and_its_overhead(report: Report) -> None:
    r"""Overhead: ``[\"a\",[10,100],0,\"bits\",125],`` in the header has 32 bytes, the checksum 4."""
    assert [row.overhead for row in report.rows] == [36, 36]
    assert [row.ratio for row in report.rows] == pytest.approx([4000 / 165, 4000 / 165], abs=1e-9)


def test_bits_of_a_parameter_are_those_of_the_whole_file(report: Report) -> None:
    assert report.totals.parameters == 2100
    assert report.totals.bits_per_parameter == pytest.approx(8 * 1166 / 2100, abs=1e-9)
    assert (report.totals.indices, report.totals.untouched, report.totals.checksums) == (250, 400, 20)


def test_the_ratio_of_the_file_is_to_the_dense_file_with_its_header(report: Report) -> None:
    """``{"a":{...},"b":{...},"c":{...}}`` takes 187 bytes, padded to 192, after 8 of its length."""
    assert report.totals.dense == 8 + 192 + 8400
    assert report.totals.ratio == pytest.approx(8600 / 1166, abs=1e-9)


def test_the_other_columns(report: Report) -> None:
    (row, _) = report.rows
    assert (row.weights, row.bits, row.used, row.allowed, row.codec, row.indices) == (1000, 1, 2, 2, "bits", 125)
    assert (row.zeros, row.entropy, row.coded) == (0.0, 1.0, 1.0)
