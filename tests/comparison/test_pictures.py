"""Pictures: the same figures give the same bytes, and scales have marks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("matplotlib", reason="needs the extra report")

import matplotlib

from compressor.comparison.front import Bounds, choices
from compressor.comparison.front_picture import front_picture, size_marks
from compressor.comparison.points import Configuration, Point


def picture(*sizes: int) -> bytes:
    ones = [Configuration(str(size), (Point(str(size), "net", size, 9000, "d", 360, 0.9),)) for size in sizes]
    return front_picture(ones, choices(ones, Bounds()), Bounds(), "d", (5.0, 5.0)).png()


def test_settings_of_the_user_change_no_byte() -> None:
    plain = picture(100, 200)
    with matplotlib.rc_context({"text.usetex": True, "lines.linewidth": 9, "font.family": "serif", "axes.ymargin": 2}):
        before = dict(matplotlib.rcParams)
        assert picture(100, 200) == plain
        assert dict(matplotlib.rcParams) == before


@given(st.floats(10, 1e9), st.floats(1.0, 1000.0), st.integers(3, 8))
def test_a_scale_has_marks_and_not_too_many(low: float, ratio: float, most: int) -> None:
    high = max(low + 2, low * ratio)
    marks = size_marks(low, high, most)
    assert 2 <= len(marks) <= most
    assert marks == sorted(set(marks))
    assert all(low <= mark <= high for mark in marks)


def test_marks_are_round_sizes() -> None:
    assert size_marks(9_000, 60_000, 8) == [10_000, 15_000, 20_000, 30_000, 50_000]
    assert size_marks(101_100, 101_900, 3) == [101_200, 101_500, 101_800]
