"""Which configurations of a sweep are trained."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from compressor.sweep.finalists import by_sharing, finalists, untrained
from compressor.sweep.grid import rows_of

PAIRS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), unique=True, max_size=12)


def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[0] and one[1] <= other[1] and one != other


@given(PAIRS, st.integers(1, 12))
def test_nothing_is_left_out_for_what_another_beats(pairs: list[tuple[int, int]], count: int) -> None:
    figures = {str(number): pair for number, pair in enumerate(pairs)}
    chosen = finalists(figures, count)
    assert len(chosen) == len(set(chosen)) == min(count, len(figures))
    for name in figures.keys() - set(chosen):
        if not any(beats(other, figures[name]) for other in figures.values()):
            assert not [taken for taken in chosen if any(beats(other, figures[taken]) for other in figures.values())]


def test_a_file_that_answers_nothing_is_no_finalist() -> None:
    assert finalists({"a": (1, math.nan), "b": (2, 0.5)}, 2) == ["b"]
    assert finalists({"a": (1, math.nan)}, 2) == []


def test_a_few_of_many_are_spread_over_all_sizes() -> None:
    figures = {str(size): (size, 100 - size) for size in range(9)}
    assert finalists(figures, 3) == ["0", "4", "8"]
    assert finalists(figures, 1) == ["4"]


def test_rows_that_share_alike_are_one_configuration() -> None:
    rows = rows_of([{"bits": [2, 3], "epochs": [1, 4], "seed": [0, 1]}])
    two, three = by_sharing(rows)
    assert [row.options["bits"] for row in two] == [2] * 4
    assert [row.options["bits"] for row in three] == [3] * 4
    assert untrained(two[3]).options == {"bits": 2, "epochs": 0, "seed": 1}
    assert untrained(two[3]).name == "bits2-epochs4-seed1"
