"""Frequencies from costs: against the slow reader's, near the best there are, and refused where they lie."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from compressor.formats.codecs import cost_tables
from compressor.formats.codecs.bit_text import BitReader, golomb, to_bytes
from compressor.formats.codecs.cost_tables import (
    CostTables,
    Curve,
    List,
    choose_tables,
    frequencies_of,
    read_tables,
    write_tables,
)
from compressor.formats.codecs.frequencies import FRACTION, code_lengths, fixed_log2
from compressor.formats.errors import FormatError
from tests.helpers import slow_ans


def slowly(text: str, count: int, codewords: int, precision: int) -> list[list[int]]:
    """The frequencies that the slow reader finds in the bits of tables."""
    bits = slow_ans.Bits(to_bytes(text))
    centre, unit, order = bits.number((codewords - 1).bit_length()), bits.number(2), bits.number(2)
    found = []
    for _ in range(count):
        slots = slow_ans.slots(slow_ans.costs(bits, centre, unit, order, codewords), precision)
        found.append([sum(symbol == owner for owner, _, _ in slots) for symbol in range(codewords)])
    return found


def read(text: str, count: int, codewords: int) -> CostTables:
    return read_tables(BitReader(memoryview(to_bytes(text))), count, codewords)


def laplace(codewords: int, spread: float, count: int, seed: int) -> NDArray[np.int64]:
    drawn = np.rint(np.random.default_rng(seed).laplace(codewords // 2, spread, count))
    return np.bincount(np.clip(drawn, 0, codewords - 1).astype(int), minlength=codewords)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(2, 70), st.integers(1, 4), st.integers(0, 2**32 - 1), st.sampled_from([0.3, 3.0, 30.0]))
def test_both_readers_find_the_same_frequencies(codewords: int, count: int, seed: int, spread: float) -> None:
    histograms = np.stack([laplace(codewords, spread / (table + 1), 30 << 4 * table, seed) for table in range(count)])
    tables, _ = choose_tables(histograms)
    text = write_tables(tables, codewords)
    assert read(text, count, codewords) == tables
    frequencies = tables.frequencies(codewords, 12)
    assert frequencies.tolist() == slowly(text, count, codewords, 12)
    assert (frequencies.sum(1) == 1 << 12).all()
    assert (frequencies[histograms > 0] > 0).all()


@pytest.mark.parametrize("count", [300, 3_000, 100_000])
@pytest.mark.parametrize(("codewords", "spread"), [(4, 0.4), (16, 2.0), (60, 3.0), (400, 40.0), (400, 2.0)])
def test_tables_and_indices_are_near_the_entropy(codewords: int, spread: float, count: int) -> None:
    """Within 0.3 % and 3 bits a used codeword; lists would take 5 and more."""
    histogram = laplace(codewords, spread, count, 0)[None]
    tables, foretold = choose_tables(histogram)
    bits = int((histogram * code_lengths(tables.frequencies(codewords, 14), 14)).sum()) / (1 << FRACTION)
    total = bits + len(write_tables(tables, codewords))
    share = histogram[histogram > 0] / count
    entropy = -float((share * np.log2(share)).sum()) * count
    assert total <= 1.003 * entropy + 3 * np.count_nonzero(histogram) + 40
    assert abs(foretold - total) <= 0.002 * total + 8


def test_few_indices_of_many_codewords_take_a_curve_and_many_a_list() -> None:
    kinds = [type(choose_tables(laplace(300, 30.0, count, 1)[None])[0].tables[0]) for count in (300, 3_000_000)]
    assert kinds == [Curve, List]
    with_a_hole = laplace(16, 3.0, 3_000, 1)
    with_a_hole[8] = 5
    assert isinstance(choose_tables(with_a_hole[None])[0].tables[0], List)


def test_a_curve_worked_by_hand() -> None:
    """Units of half a bit: 2, 3 and 5 of them to the distances 1, 2 and 4; half of five is rounded down."""
    tables = CostTables(3, 1, 0, (Curve((2, 3, 5)),))
    assert tables.costs(9).tolist() == [[30, 20, 8, 0, 8, 20, 30, 40, 128]]
    assert CostTables(0, 3, 0, (Curve(()), Curve((100, 100)))).costs(3).tolist() == [[0, 128, 128], [0, 100, 127]]


def test_a_list_worked_by_hand() -> None:
    """Quarters of a bit from the centre out: 1, 1 + 3 above it, 1 + 2 and 3 + 61, which is none, below."""
    tables = CostTables(2, 2, 0, (List(2, 1, (1, 3, 2, 61)),))
    assert tables.costs(5).tolist() == [[128, 6, 2, 8, 128]]


def test_frequencies_worked_by_hand() -> None:
    """Costs of 1, 2 and 2 bits share 13 of 16 slots as 6.5, 3.25, 3.25: up to 6, 9 and 13; one slot each besides."""
    tables = CostTables(0, 0, 0, (List(0, 2, (1, 1, 0)),))
    assert tables.frequencies(3, 4).tolist() == [[7, 4, 5]]


def test_tables_of_several_parts_stand_one_below_the_other() -> None:
    """Each has the frequencies that it has alone, whatever centre, unit and number of codewords the others have."""
    parts = [
        (CostTables(2, 1, 0, (Curve((3, 2)),)), 4),
        (CostTables(0, 3, 1, (Curve(()), List(0, 1, (8, -3)))), 2),
        (CostTables(30, 0, 2, (List(30, 9, (1,) * 10 + (0,) * 30), Curve((1,) * 6))), 40),
    ]
    found = frequencies_of(parts, 9)
    assert found.shape == (5, 40)
    alone = [table.frequencies(codewords, 9) for table, codewords in parts]
    rows = [[*row, *[0] * (40 - len(row))] for one in alone for row in one.tolist()]
    assert found.tolist() == rows
    assert (found.sum(1) == 512).all()


def test_every_codeword_may_take_the_one_slot_it_has() -> None:
    tables = CostTables(0, 0, 0, (List(0, 255, (0,) * 256),))
    assert tables.frequencies(256, 8).tolist() == [[1] * 256]
    with pytest.raises(FormatError, match="more codewords than its 128 slots"):
        tables.frequencies(256, 7)


def header(codewords: int, centre: int, unit: int = 0) -> str:
    return f"{centre:0{(codewords - 1).bit_length()}b}{unit:02b}00"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (header(5, 7) + "0000", "the centre of the frequencies is none"),
        (header(5, 2) + "1111" + "011" + "000" + golomb(0, 0) * 4, "beyond the codewords"),
        (header(5, 2) + "1111" + "000" + "011" + golomb(0, 0) * 4, "beyond the codewords"),
        (header(5, 2) + "1111" + "000" + "000" + golomb(1, 0), "out of range"),
        (header(5, 2) + "1111" + "000" + "000" + golomb(34, 0), "out of range"),
        (header(5, 2) + "1111" + "000" + "000" + golomb(32, 0), "or none"),
        (header(5, 2), "is cut"),
    ],
)
def test_lies(text: str, fault: str) -> None:
    with pytest.raises(FormatError, match=fault):
        read(text, 1, 5).frequencies(5, 8)


def test_any_increments_stay_whole_numbers_in_range() -> None:
    """The largest numbers that the bits can say, in every place."""
    largest = (1 << 27) - 1
    costs = CostTables(0, 0, 3, (Curve((largest,) * 14),)).costs(1 << 14)
    assert costs[0, 0] == 0
    assert (costs[0, 1:8193] == 127).all()
    assert (costs[0, 8193:] == 128).all()


def test_weights_are_powers_of_two() -> None:
    exact = 2.0 ** (31 - np.arange(128) / 8)
    assert np.abs(cost_tables._WEIGHTS[:128] / exact - 1).max() < 2e-5
    assert cost_tables._WEIGHTS[128:].tolist() == [0]


def test_logarithms_of_large_numbers_are_the_same_everywhere() -> None:
    numbers = np.concatenate([np.arange(1, 70_000), np.random.default_rng(0).integers(1, 1 << 52, 70_000)])
    found = fixed_log2(numbers)
    assert np.abs(found / (1 << FRACTION) - np.log2(numbers.astype(float))).max() < 2**-22
    assert (np.diff(fixed_log2(np.sort(numbers))) >= 0).all()
