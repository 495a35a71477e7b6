"""A packed weight alone: it expands to what the decoder of records gives, bit for bit."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from compressor.formats.content import Codebook, Grid, SharedTensor, Table, decode, index_dtype, index_shape
from compressor.formats.inference.packed_weight import PackedWeight
from compressor.formats.torch_tensors import TORCH_DTYPES

RANDOM = np.random.default_rng(0)


def expanded(site: SharedTensor, book: Codebook) -> None:
    """Compare with ``content.decode`` to the bit."""
    wanted = torch.from_numpy(decode(site, book))
    if site.dtype == "BF16":
        wanted = wanted.view(torch.bfloat16)
    weight = PackedWeight(site, torch.from_numpy(book.expand()))(torch.empty(0, dtype=TORCH_DTYPES[site.dtype]))
    assert weight.dtype == wanted.dtype
    assert weight.is_contiguous()
    assert torch.equal(weight, wanted)


def record(
    shape: tuple[int, ...], book: Codebook, dtype: str = "F32", scaled: bool = False, **layout: Any
) -> SharedTensor:
    _, codewords, length = book.shape
    count = math.prod(index_shape(shape, length, layout.get("vector_axis", 0)))
    indices = RANDOM.integers(0, codewords, count).astype(index_dtype(codewords))
    site = SharedTensor(shape, 0, indices, dtype, **layout)
    if not scaled:
        return site
    scale, offset = RANDOM.standard_normal((2, site.groups)).astype(np.float32)
    return replace(site, scale=scale, offset=offset)


def table(codewords: int, books: int = 1, length: int = 1, mirrored: bool = False) -> Table:
    values = RANDOM.standard_normal((books, codewords, length)).astype(np.float32)
    return Table(np.sort(values, axis=1), mirrored=mirrored)


@pytest.mark.parametrize("bits", range(19))
def test_all_widths(bits: int) -> None:
    for codewords in {1 << bits, (1 << bits) - (1 << bits) // 3}:
        for count in (1, 7, 8, 9, 1001):
            expanded(record((count, 1), table(codewords)), table(codewords))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("layout", [{}, {"axis": 0}, {"axis": 2}, {"block": 7}, {"block": 8}])
def test_scale_and_offset_of_groups(layout: dict[str, Any], dtype: str) -> None:
    book = table(16)
    expanded(record((8, 5, 3), book, dtype, scaled=True, **layout), book)


@pytest.mark.parametrize("layout", [{"axis": 0}, {"axis": 1}, {"block": 15}])
def test_a_book_per_group(layout: dict[str, Any]) -> None:
    book = table(6, books=8)
    expanded(record((8, 8) if "axis" in layout else (8, 15), book, **layout), book)


@pytest.mark.parametrize("length", [2, 4, 5])
@pytest.mark.parametrize("codewords", [1, 3, 16, 300])
def test_vectors(length: int, codewords: int) -> None:
    for vector_axis in range(3):
        book = table(codewords, length=length)
        expanded(record((8, 6, 5), book, vector_axis=vector_axis, scaled=True, axis=1), book)


@pytest.mark.parametrize(("axis", "vector_axis"), [(0, 1), (0, 2), (1, 0), (2, 0), (2, 1)])
def test_vectors_of_a_book_per_group(axis: int, vector_axis: int) -> None:
    book = table(5, books=4, length=3)
    expanded(record((4, 4, 4), book, axis=axis, vector_axis=vector_axis), book)


@pytest.mark.parametrize("book", [Grid(-1.0, 2**-15, 1 << 16), Grid(0.1, 0.3, 7), table(5, mirrored=True)])
def test_grids_and_mirrored_books(book: Codebook) -> None:
    expanded(record((64, 33), book), book)
