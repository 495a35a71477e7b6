"""The front of size and accuracy, and the choices of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from compressor.comparison.front import Bounds, by_configuration, choices, front
from compressor.comparison.points import Configuration, Point, configurations, told_apart

DENSE = 1000


def point(name: str, size: int, top1: float | None, **more: object) -> Point:
    return Point(name, "net", size, DENSE, "digits, test", 360, top1, 0.95, options={"bits": name, **more})


def configuration(name: str, size: int, top1: float | None) -> Configuration:
    return Configuration(name, (point(name, size, top1),))


def titles(ones: list[Configuration], bounds: Bounds) -> dict[str, str]:
    return {choice.title: choice.configuration.name for choice in choices(ones, bounds)}


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), max_size=12))
def test_the_front_is_what_no_other_beats(pairs: list[tuple[int, int]]) -> None:
    ones = [configuration(str(number), size, top1 / 6) for number, (size, top1) in enumerate(pairs)]

    def beats(one: Configuration, other: Configuration) -> bool:
        assert one.top1 is not None
        assert other.top1 is not None
        as_good = one.bytes <= other.bytes and one.top1 >= other.top1
        return as_good and (one.bytes < other.bytes or one.top1 > other.top1)

    unbeaten = {(one.bytes, one.top1) for one in ones if not any(beats(other, one) for other in ones)}
    found = front(ones)
    assert [(one.bytes, one.top1) for one in found] == sorted(unbeaten)  # each pair once, by ascending size


def test_what_was_not_measured_is_on_no_front() -> None:
    assert front([configuration("a", 1, None)]) == []
    assert choices([configuration("a", 1, None)], Bounds()) == []


def test_three_choices() -> None:
    ones = [
        configuration("bad", 50, 0.50),
        configuration("small", 100, 0.91),
        configuration("knee", 200, 0.945),
        configuration("large", 800, 0.95),
        configuration("beaten", 900, 0.94),
    ]
    assert titles(ones, Bounds()) == {"Quality": "large", "Balanced": "knee", "Compact": "small"}
    assert titles(ones, Bounds(size=200))["Quality"] == "knee"
    assert titles(ones, Bounds(top1=0.945)) == {"Quality": "large", "Balanced": "knee", "Compact": "knee"}
    assert titles(ones, Bounds(size=99)) == {"Quality": "bad", "Balanced": "bad", "Compact": "bad"}
    assert choices(ones, Bounds(size=49)) == []
    assert choices(ones, Bounds(size=100, top1=0.92)) == []


def test_files_that_differ_by_their_seed_alone_are_one_configuration() -> None:
    first = Point("b2-seed0", "net", 100, DENSE, "d", 360, 0.90, options={"bits": 2, "seed": 0})
    second = Point("b2-seed1", "net", 120, DENSE, "d", 360, 0.94, options={"bits": 2, "seed": 1})
    other = Point("b3-seed0", "net", 150, DENSE, "d", 360, 0.95, options={"bits": 3, "seed": 0})
    pair, single = configurations([second, other, first])  # as they have ended
    assert (pair.name, pair.points) == ("b2", (first, second))
    assert pair.bytes == 110
    assert pair.top1 is not None
    assert abs(pair.top1 - 0.92) < 1e-12
    assert pair.deviation is not None
    assert abs(pair.deviation - 0.02828427) < 1e-7
    assert (single.name, single.deviation) == ("b3-seed0", None)


def test_files_without_options_are_each_their_own() -> None:
    same = [Point("a", "net", 1, 2), Point("a", "net", 1, 2)]
    assert [one.points for one in configurations(same)] == [(same[0],), (same[1],)]


def test_rows_of_two_sweeps_are_no_seeds_of_each_other() -> None:
    both = [Point(f"b2-seed{seed}", "net", 100, DENSE, options={"bits": 2, "seed": seed}) for seed in (0, 1)]
    rows = [replace(one, source=Path(folder)) for folder in ("a", "b") for one in both]
    found = configurations(told_apart(rows))
    assert [(one.name, len(one.points)) for one in found] == [("a/b2", 2), ("b/b2", 2)]
    assert [one.name for one in configurations(told_apart(rows[:2]))] == ["b2"]


def test_files_of_one_name_are_told_apart() -> None:
    files = [Point(name, "net", 1, 2, source=Path(folder)) for name, folder in (("x", "a"), ("x", "b"), ("y", "b"))]
    assert [one.name for one in told_apart(files)] == ["a/x", "b/x", "y"]


def test_choices_of_configurations_of_one_name_stay_apart() -> None:
    large, small = configuration("same", 800, 0.95), configuration("same", 100, 0.91)
    together = by_configuration(choices([large, small], Bounds()))
    assert [[choice.title for choice in same] for same in together] == [["Quality"], ["Balanced", "Compact"]]
