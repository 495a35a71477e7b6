"""The choice of classes: found where there are any, none where there are none, the same on every machine."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from compressor.formats.codecs import site_classes
from compressor.formats.codecs.site_classes import Classes, choose_classes

SIZES = 64, 48, 9


def drawn(*factors: NDArray[np.float64], seed: int = 0, sizes: tuple[int, int, int] = SIZES) -> NDArray[Any]:
    """Indices below 31 whose spread is the product of a factor for each row, column and position."""
    spread = np.ones(sizes)
    for axis, factor in enumerate(factors):
        spread = spread * np.resize(factor, sizes[axis]).reshape([-1 if axis == other else 1 for other in range(3)])
    found = np.rint(np.random.default_rng(seed).normal(size=sizes) * spread) + 15
    indices: NDArray[Any] = np.clip(found, 0, 30).astype(np.uint8).reshape(-1)
    return indices


ONE, TWO = np.ones(1), np.array([0.4, 3.0])


@pytest.mark.parametrize("axis", range(3))
def test_two_kinds_along_an_axis_get_classes_of_their_own(axis: int) -> None:
    factors = [TWO if other == axis else ONE for other in range(3)]
    classes = choose_classes(drawn(*factors), SIZES, 31)
    for other, found in enumerate(classes.axes):
        small, large = found[::2], found[1::2]
        assert (small.min() > large.max()) if other == axis else not found.any()


def test_all_three_axes_at_once() -> None:
    classes = choose_classes(drawn(TWO, TWO, np.array([0.5, 0.5, 2.0])), SIZES, 31)
    assert all(len(np.unique(found)) > 1 for found in classes.axes)


@pytest.mark.parametrize("seed", range(5))
def test_none_where_all_are_alike(seed: int) -> None:
    assert choose_classes(drawn(ONE, seed=seed), SIZES, 31).tables == 1


def test_rows_without_anything_have_a_class_of_their_own() -> None:
    indices = drawn(np.array([1.0, 0.0]))
    classes = choose_classes(indices, SIZES, 31)
    assert classes.axes[0][1::2].min() > classes.axes[0][::2].max()
    assert set(indices[classes.choices(0, len(indices)) == classes.tables - 1]) == {15}


def test_one_codeword_alone_and_single_indices() -> None:
    assert choose_classes(np.zeros(24, np.uint8), (4, 3, 2), 1).tables == 1
    assert choose_classes(np.full(24, 3, np.uint8), (4, 3, 2), 9).tables == 1
    assert choose_classes(np.array([3], np.uint8), (1, 1, 1), 9).tables == 1


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(1, 32), st.integers(0, 2**32 - 1))
def test_the_table_is_the_sum_of_three_classes(rows: int, columns: int, positions: int, tables: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second, third = (rng.integers(0, tables, size) for size in (rows, columns, positions))
    classes = Classes(tables, (first, second, third))
    expected = [min(a + b + c, tables - 1) for a in first for b in second for c in third]
    start, stop = sorted(rng.integers(0, len(expected) + 1, 2).tolist())
    assert classes.choices(0, len(expected)).tolist() == expected
    assert classes.choices(start, stop).tolist() == expected[start:stop]
    assert classes.counts().tolist() == [expected.count(table) for table in range(tables)]


def test_a_part_of_many_indices_decides_as_all_do(monkeypatch: pytest.MonkeyPatch) -> None:
    indices = drawn(TWO, ONE, ONE)
    whole = choose_classes(indices, SIZES, 31)
    monkeypatch.setattr(site_classes, "_SAMPLE", len(indices) // 4)
    part = choose_classes(indices, SIZES, 31)
    assert whole.axes[0][:2].argmax() == part.axes[0][:2].argmax()
    assert part.tables > 1


def test_time_and_memory_do_not_grow_with_the_indices_beyond_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """All histograms of the choice are of a part of the indices, whatever their number."""
    sizes = 64, 64, 9
    indices = drawn(TWO, TWO, ONE, sizes=sizes)
    monkeypatch.setattr(site_classes, "_SAMPLE", 1_000)
    lengths = []
    original = site_classes._View._sum

    def spy(view: Any, classes: Classes, axes: tuple[int, ...]) -> Any:
        found = original(view, classes, axes)
        lengths.append(len(found))
        return found

    monkeypatch.setattr(site_classes._View, "_sum", spy)
    choose_classes(indices, sizes, 31)
    assert max(lengths) <= 1_000
    assert len(lengths) <= 4 * 7 + 3 + 3 + 3  # steps and sets of axes; none, best and refined; costs of each axis


def test_what_is_asked_of_a_long_row_takes_no_memory_for_the_rest() -> None:
    axes = np.array([1]), np.arange(16) % 2, np.arange(1 << 18) % 3
    classes = Classes(3, axes)
    classes.choices(0, 10)
    tracemalloc.start()
    found = classes.choices(1 << 21, (1 << 21) + 1_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000
    places = range(1 << 21, (1 << 21) + 1_000)
    assert found.tolist() == [min(1 + (place >> 18) % 2 + place % (1 << 18) % 3, 2) for place in places]
