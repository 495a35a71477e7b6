"""Figures over all weights together, against the slow obvious way."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.formats.codecs.prefix_codes import limited_lengths
from compressor.formats.content import Content, SharedTensor, Table
from compressor.formats.file.reader import PackedFile
from compressor.formats.file.writer import pack
from compressor.report.report import Report
from compressor.report.weight_stats import gap_coded_bytes, power_of_two_terms


def report_of(sites: dict[str, SharedTensor], *books: Table) -> Report:
    with PackedFile.from_bytes(pack(Content(sites, books))) as file:
        return Report.of(file)


def fewest_terms(value: int) -> int:
    """Try all sums of ever more signed powers of two."""
    powers = [sign * 2**exponent for exponent in range(9) for sign in (1, -1)]
    return next(
        terms
        for terms in itertools.count()
        if any(sum(sums) == value for sums in itertools.combinations(powers, terms))
    )


@pytest.mark.parametrize("value", range(64))
def test_terms_are_the_fewest(value: int) -> None:
    assert power_of_two_terms(np.array([value, -value / 4], np.float32)).tolist() == [fewest_terms(value)] * 2


def test_both_conventions() -> None:
    """With everything; and as Weight Fixing Networks are published, without zeros and down-sampling layers."""
    book = Table.of([-1.0, 0.0, 0.5])
    conv = SharedTensor((8,), 0, np.array([0, 0, 1, 1, 1, 1, 2, 2], np.uint8))
    down = SharedTensor((4,), 1, np.array([0, 0, 0, 0], np.uint8))
    space = report_of({"conv.weight": conv, "layer.downsample.0.weight": down}, book, Table.of([3.0])).weight_space
    assert (space.unique, space.unique_nonzero) == (4, 2)
    assert space.entropy_nonzero == 1.0
    shares = np.array([2, 4, 2, 4]) / 12
    assert space.entropy == pytest.approx(-(shares * np.log2(shares)).sum())
    assert space.power_terms == pytest.approx((2 * 1 + 4 * 0 + 2 * 1 + 4 * 2) / 12)


def test_figures_as_published_for_weight_fixing_are_printed_for_its_files_alone() -> None:
    shared = SharedTensor((8,), 0, np.array([0, 0, 1, 1, 1, 1, 2, 2], np.uint8))
    for scheme in ("wfn", "learnt"):
        recipe = {"stage": [{"rule": [{"match": "*", "scheme": scheme}]}]}
        content = Content({"w": shared}, (Table.of([-1.0, 0.0, 0.5]),), recipe=recipe, provenance={"rules": [0]})
        with PackedFile.from_bytes(pack(content)) as file:
            report = Report.of(file)
        assert ("without zeros and down-sampling 2 values" in report.details()) == (scheme == "wfn")
        assert report.to_dict()["weight_space"]["unique_nonzero"] == 2


def test_the_same_value_in_two_books_or_by_a_scale_counts_once() -> None:
    one = SharedTensor((2,), 0, np.array([0, 1], np.uint8))
    two = SharedTensor((2,), 1, np.array([0, 1], np.uint8), scale=np.array([2.0], np.float32))
    per_slice = SharedTensor((2, 2), 2, np.zeros(4, np.uint8), axis=0, scale=np.array([1, 7], np.float32))
    books = Table.of([1.0, 2.0]), Table.of([0.5, 1.0]), Table.of([1.0])
    assert report_of({"a": one, "b": two, "c": per_slice}, *books).weight_space.unique == 3


def test_a_tensor_shorter_than_its_block_is_counted() -> None:
    """More codewords than weights, all in one block with one scale."""
    book = Table.of(np.arange(8.0), "F32")
    site = SharedTensor((3,), 0, np.array([1, 2, 2], np.uint8), block=4, scale=np.array([0.5], np.float32))
    assert report_of({"fc.weight": site}, book).weight_space.unique == 2


def slow_gap_coding(indices: list[int], zero: int, field: int) -> tuple[list[int], list[int]]:
    """Write values and gaps down one after the other: a gap of ``field`` zeros is followed by a filler zero."""
    values, gaps, run = [], [], 0
    last = max((place for place, index in enumerate(indices) if index != zero), default=-1)
    for index in indices[: last + 1]:
        if index == zero and run < field - 1:
            run += 1
            continue
        values.append(index)
        gaps.append(run)
        run = 0
    return values, gaps


@given(st.lists(st.integers(0, 400), min_size=1, max_size=6), st.booleans())
def test_gap_coding_against_writing_it_down(runs: list[int], convolution: bool) -> None:
    """Runs of zeros of all lengths: the field's largest, one more, twice as many."""
    indices = [index for run in runs for index in [0] * run + [1 + run % 2]]
    shape = (len(indices), 1, 1) if convolution else (len(indices), 1)
    shared = SharedTensor(shape, 0, np.array(indices, np.uint8))
    field = 256 if convolution else 32
    values, gaps = slow_gap_coding(indices, 0, field)
    bits = 4 * (field + 3)
    for symbols, size in ((values, 3), (gaps, field)):
        counts = np.bincount(symbols, minlength=size)
        bits += int((counts * limited_lengths(counts)).sum())
    histogram = np.bincount(indices, minlength=3)
    assert gap_coded_bytes(shared, 0, histogram) == -(-bits // 8)


def test_the_gap_coded_form_is_shown_for_sparse_files_alone() -> None:
    dense = SharedTensor((64,), 0, np.arange(64).astype(np.uint8) % 3)
    assert report_of({"w": dense}, Table.of([-1, 0, 1])).gap_coded is None
    sparse = SharedTensor((64,), 0, np.where(np.arange(64) % 16, 1, 2).astype(np.uint8))
    report = report_of({"w": sparse}, Table.of([-1, 0, 1]))
    assert report.gap_coded == gap_coded_bytes(sparse, 1, np.array([0, 60, 4]))
    assert "gap-coded as in Deep Compression" in report.table(120, everything=True)
    assert report.to_dict()["gap_coded"] == report.gap_coded
