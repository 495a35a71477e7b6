"""Tables of configurations as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io

import pytest

from compressor.comparison.points import Configuration, Point
from compressor.comparison.tables import table_of_configurations, text_of

SMALL = Configuration("a_b|c", (Point("x", "net", 1234, 12340, "digits, test", 360, 0.9, 0.95, "compress net, so"),))
LARGE = Configuration("large", (Point("y", "net", 9999, 12340, "digits, test", 360, 0.8, 0.95),))
TABLE = table_of_configurations([LARGE, SMALL])


def test_rows_are_by_size_and_those_of_the_front_are_marked() -> None:
    assert [(row.cells[0].text, row.on_front) for row in TABLE.rows] == [("a_b|c", True), ("large", False)]


def test_csv_has_plain_numbers_and_commands() -> None:
    first, second = csv.DictReader(io.StringIO(text_of(TABLE, "csv")))
    assert (first["configuration"], first["bytes"], first["top-1, %"], first["smaller"]) == (
        "a_b|c", "1234", "90.00", "10.00",
    )  # fmt: skip
    assert (first["worth having"], first["command"]) == ("yes", "compress net, so")
    assert (second["worth having"], second["command"]) == ("no", "")


@pytest.mark.parametrize(("kind", "escaped"), [("markdown", r"a\_b\|c"), ("latex", r"a\_b|c")])
def test_text_is_escaped_and_empty_columns_are_left_out(kind: str, escaped: str) -> None:
    text = text_of(TABLE, kind)
    assert escaped in text
    assert "1,234" in text
    assert "lost" not in text  # nothing is known of it
    assert "deviation" not in text


def test_configurations_of_one_name_have_each_their_own_command() -> None:
    ones = [
        Configuration("same", (Point("same", "net", size, 12340, command=f"compress net {size}"),)) for size in (10, 20)
    ]
    table = table_of_configurations(ones).without_empty_columns()
    commands = [row["command"] for row in csv.DictReader(io.StringIO(text_of(table, "csv")))]
    assert commands == ["compress net 10", "compress net 20"]


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("+1", "'+1"),
        ("-1", "'-1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", r"'\x09=1"),
        ("\r=1", r"'\x0d=1"),
        ("a\r=1", r"a\x0d=1"),
        ("a=1", "a=1"),
    ],
)
def test_names_are_no_formulas_of_a_spreadsheet(name: str, cell: str) -> None:
    table = table_of_configurations([Configuration(name, (Point(name, "net", 10, 20, command=name),))])
    (row,) = csv.DictReader(io.StringIO(text_of(table, "csv"), newline=""))
    assert (row["configuration"], row["command"], row["bytes"]) == (cell, cell, "10")


@pytest.mark.parametrize("name", ["[a]", "*", "* b", " [x"])
def test_no_cell_of_latex_is_an_argument_of_the_row_before(name: str) -> None:
    table = table_of_configurations([SMALL, Configuration(name, LARGE.points)])
    (line,) = [line for line in text_of(table, "latex").splitlines() if "9,999" in line]
    assert line.split("&")[0].strip() == f"{{}}{name}".strip()
