"""Rows of a sweep: all combinations, each with a name that is one of files."""

from __future__ import annotations

import pytest

from compressor.formats.errors import UsageError
from compressor.sweep.grid import rows_of


def test_rows_are_all_combinations_and_the_first_option_changes_slowest() -> None:
    rows = rows_of([{"bits": [2, 3], "seed": [0, 1]}, {"scheme": ["wfn"], "delta": [0.01]}])
    assert [dict(row.options) for row in rows] == [
        {"bits": 2, "seed": 0},
        {"bits": 2, "seed": 1},
        {"bits": 3, "seed": 0},
        {"bits": 3, "seed": 1},
        {"scheme": "wfn", "delta": 0.01},
    ]
    assert [row.name for row in rows] == ["bits2-seed0", "bits2-seed1", "bits3-seed0", "bits3-seed1", "wfn-delta0.01"]


def test_a_sweep_of_nothing_is_one_run() -> None:
    (row,) = rows_of([{}])
    assert (row.name, row.options) == ("run", {})


@pytest.mark.parametrize(
    "value", ["../../etc/passwd", ".hidden", "a b;c", "x" * 300, "\x1b[2J", "字" * 90, "a" + "字" * 90]
)
def test_names_are_names_of_files_and_differ(value: str) -> None:
    first, second = rows_of([{"recipe": [value, value + "!"]}])
    for row in (first, second):
        assert "/" not in row.name
        assert not row.name.startswith(".")
        assert row.name.isprintable()
        assert len(row.name.encode()) < 200
    assert first.name != second.name


def test_the_same_row_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="two rows are bits2: leave out one"):
        rows_of([{"bits": [2]}, {"bits": [3, 2]}])


def test_a_value_that_looks_as_another_option_has_a_name_of_its_own() -> None:
    one, other = rows_of([{"recipe": ["a-bits2"]}, {"recipe": ["a"], "bits": [2]}])
    assert other.name == "a-bits2"
    assert one.name.startswith("a-bits2-")
