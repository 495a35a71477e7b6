"""A palette has the weights that the file's own decoder gives, bit for bit, for every kind of tensor that it takes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from compressor.formats.content import SharedTensor, Table, decode, index_shape
from compressor.targets.coreml_palette import Palette, gains, palette, why_dense
from tests.formats.test_content import RECORDS, indices, normal


def expand(found: Palette) -> NDArray[Any]:
    """Returns the weights by Core ML's definition of ``constexpr_lut_to_dense``, entry by entry."""
    spread = found.indices
    if found.mask is not None:
        spread = np.zeros(found.mask.shape, np.uint8)
        spread[found.mask] = found.indices
    length = found.table.shape[-1]
    shape = [size * (length if axis == found.vector_axis else 1) for axis, size in enumerate(spread.shape)]
    weights = np.zeros(shape, np.float32)
    for place in np.ndindex(*shape):
        at = tuple(i // length if axis == found.vector_axis else i for axis, i in enumerate(place))
        group = tuple(i * groups // size for i, groups, size in zip(at, found.table.shape, spread.shape, strict=False))
        if found.mask is None or found.mask[at]:
            within = place[found.vector_axis] % length
            weights[place] = found.table[(*group, spread[at], within)]
    return weights


@pytest.mark.parametrize("record", RECORDS)
def test_a_palette_expands_to_what_the_file_decodes_to(record: str) -> None:
    content = RECORDS[record]()
    for site in content.sites.values():
        book = content.books[site.book]
        if not why_dense(site, book):
            np.testing.assert_array_equal(expand(palette(site, book)), decode(site, book))


@pytest.mark.parametrize("axis", [0, 2])
def test_vectors_with_tables_scales_and_offsets_by_axis(axis: int) -> None:
    shape, length = (4, 6, 3), 3
    count = math.prod(index_shape(shape, length, 1))
    book = Table(np.sort(normal(shape[axis], 5, length), axis=1))
    scale, offset = normal(shape[axis]), normal(shape[axis], seed=1)
    site = SharedTensor(shape, 0, indices(count, 5), axis=axis, scale=scale, offset=offset, vector_axis=1)
    assert not why_dense(site, book)
    found = palette(site, book)
    assert found.table.shape == (*(shape[axis] if each == axis else 1 for each in range(3)), 8, 3)
    np.testing.assert_array_equal(expand(found), decode(site, book))


@pytest.mark.parametrize(("codewords", "bits"), [(1, 1), (2, 1), (3, 2), (5, 3), (16, 4), (17, 6), (65, 8), (256, 8)])
def test_tables_are_padded_to_what_core_ml_takes(codewords: int, bits: int) -> None:
    site, book = SharedTensor((32, 64), 0, indices(2048, codewords)), Table.of(normal(codewords))
    found = palette(site, book)
    assert (found.bits, found.table.shape) == (bits, (1, 1, 1 << bits, 1))
    assert found.size == 2048 * bits // 8 + 4 * (1 << bits)
    assert gains(site, book)


def test_many_zeros_are_a_mask() -> None:
    book = Table.of([-2, -1, 0, 1, 2])
    choices = np.full(4000, 2, np.uint8)
    choices[::10] = indices(400, 5)
    site = SharedTensor((40, 100), 0, choices)
    found = palette(site, book)
    assert found.mask is not None
    assert int(found.mask.sum()) == int((choices != 2).sum()) == len(found.indices)
    assert found.bits == 2
    assert found.size < 4000 / 8 + 400 / 4 + 17
    np.testing.assert_array_equal(expand(found), decode(site, book))


@pytest.mark.parametrize(
    ("changes", "codewords", "length", "reason"),
    [
        ({}, 257, 1, "257 codewords, Core ML takes 256"),
        ({"block": 4}, 4, 1, "its groups of 4 weights are not equally many whole rows"),
        ({"block": 24}, 4, 1, "its groups of 24 weights are not equally many whole rows"),
        ({"vector_axis": 1}, 4, 3, "vectors of 3 do not divide its 8 rows"),
        ({"dtype": "F16"}, 4, 1, "it is F16, expected F32"),
    ],
)
def test_what_stays_dense_has_a_reason(changes: dict[str, Any], codewords: int, length: int, reason: str) -> None:
    site = SharedTensor((16, 8), 0, indices(128, 4), **changes)
    assert why_dense(site, Table(normal(1, codewords, length))) == reason


def test_groups_of_rows_have_tables_of_their_own() -> None:
    book = Table(np.sort(normal(4, 3, 1), axis=1))
    site = SharedTensor((8, 5, 2), 0, indices(80, 3), block=20, scale=normal(4))
    found = palette(site, book)
    assert found.table.shape == (4, 1, 1, 4, 1)
    np.testing.assert_array_equal(expand(found), decode(site, book))


def test_small_tensors_and_large_tables_do_not_gain() -> None:
    assert not gains(SharedTensor((8, 8), 0, indices(64, 4)), Table.of(normal(4)))
    rows = SharedTensor((64, 64), 0, indices(4096, 200), axis=0, scale=normal(64))
    assert not gains(rows, Table.of(normal(200)))
    assert gains(SharedTensor((64, 64), 0, indices(4096, 4), axis=0, scale=normal(64)), Table.of(normal(4)))


def test_palettes_that_differ_anywhere_have_other_identities() -> None:
    values = indices(60, 4).reshape(6, 10)
    table = normal(1, 1, 4, 1)
    mask = values > 0
    found = [
        Palette(values, table),
        Palette(values, table + 1),
        Palette(np.flip(values), table),
        Palette(values[mask], table, mask=mask),
        Palette(values, table.reshape(1, 1, 2, 2)),
        Palette(values, table.reshape(1, 1, 2, 2), vector_axis=1),
    ]
    assert len({each.identity for each in found}) == len(found)
    assert Palette(values.copy(), table.copy(), vector_axis=1).identity == found[0].identity
