"""The record of a sweep: each row once, whoever appends, and whatever a killed process has left."""

from __future__ import annotations

import csv
import json
import re
import threading
import time
from pathlib import Path

import pytest

from compressor.formats.errors import FormatError, UsageError
from compressor.formats.io.locking import holding
from compressor.sweep.grid import Row
from compressor.sweep.ledger import Entry, Ledger, waiting_for
from compressor.sweep.outcome import Outcome


def entry(row: str, size: int = 100, **options: object) -> Entry:
    outcome = Outcome("tiny", f"{row}.safetensors", size, 800, 200, 32, 0.5, missed=("a", "b"))
    return Entry(row, options, f"compress tiny -o {row}.safetensors", 1.5, outcome)


def test_what_is_appended_is_read_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.entries() == []
    first, second = entry("a", bits=2), entry("b", 50, scheme="learnt, or so", bits=3)
    assert ledger.append(first)
    assert ledger.append(second)
    assert Ledger(tmp_path).entries() == [first, second]


def test_a_table_that_lacks_rows_is_written_anew(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.restore_table()
    assert list(tmp_path.glob("*.csv")) == []
    ledger.append(entry("a"))
    whole = (tmp_path / "rows.csv").read_text()
    (tmp_path / "rows.csv").write_text("")
    ledger.restore_table()
    assert (tmp_path / "rows.csv").read_text() == whole
    assert whole.count("a,") == 1


def test_text_in_the_table_is_no_formula(tmp_path: Path) -> None:
    Ledger(tmp_path).append(entry("=1+1", recipe="@SUM(A1)", drop=-1))
    (row,) = csv.DictReader((tmp_path / "rows.csv").read_text(encoding="utf-8").splitlines())
    assert (row["row"], row["recipe"], row["drop"]) == ("'=1+1", "'@SUM(A1)", "-1")


def test_a_row_is_appended_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.append(entry("a", 100))
    before = ledger.path.read_bytes()
    assert not ledger.append(entry("a", 200))
    assert ledger.path.read_bytes() == before


def test_a_row_of_other_options_does_not_count_as_recorded(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append(entry("a", data=Path("x"), bits=2))
    rows = [Row("a", {"bits": 2, "data": Path("x")}), Row("b", {"bits": 3})]
    assert ledger.recorded(rows) == {"a"}
    with pytest.raises(UsageError, match=r"has a row a of .* give another folder with -o"):
        ledger.recorded([Row("a", {"recipe": "a"})])


def test_a_lock_is_waited_for_which_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    held, waited = holding(tmp_path / "file"), threading.Event()

    def wait() -> None:
        with waiting_for(tmp_path / "file", lambda: said.append("waiting")):
            waited.set()

    with held:
        thread = threading.Thread(target=wait)
        thread.start()
        assert not waited.wait(0.2)
    thread.join(30)
    assert waited.is_set()
    assert said == ["waiting"]


def test_the_table_has_a_row_for_each_and_a_column_for_each_option(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append(entry("a", bits=2))
    ledger.append(entry("b", 50, scheme="learnt, or so"))
    with (tmp_path / "rows.csv").open(newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert (first["row"], first["bits"], first["scheme"], first["bytes"]) == ("a", "2", "", "100")
    assert (second["row"], second["bits"], second["scheme"], second["top1"]) == ("b", "", "learnt, or so", "0.5")
    assert second["missed"] == "a; b"


@pytest.mark.parametrize("kept", [0, 1, 20])
def test_what_a_killed_process_has_left_of_a_line_is_dropped(tmp_path: Path, kept: int) -> None:
    ledger = Ledger(tmp_path)
    ledger.append(entry("a"))
    with ledger.path.open("ab") as file:
        file.write(entry("b").line().encode()[:kept])
    assert ledger.entries() == [entry("a")]
    assert ledger.append(entry("b"))
    assert ledger.entries() == [entry("a"), entry("b")]


def test_many_at_once_lose_and_repeat_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Ledger._add

    def late(ledger: Ledger, line: bytes) -> None:
        time.sleep(0.01)  # after the look at the rows that are there
        write(ledger, line)

    monkeypatch.setattr(Ledger, "_add", late)
    names = [f"row{number}" for number in range(8)]
    new: list[bool] = []
    threads = [
        threading.Thread(target=lambda: new.extend(Ledger(tmp_path).append(entry(name)) for name in names))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(one.row for one in Ledger(tmp_path).entries()) == names
    assert sum(new) == len(names)


def test_a_later_version_may_know_more(tmp_path: Path) -> None:
    facts = json.loads(entry("a", bits=2).line())
    facts["outcome"]["watts"] = 7
    (tmp_path / "rows.jsonl").write_text(json.dumps(facts) + "\n")
    assert Ledger(tmp_path).entries() == [entry("a", bits=2)]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("schema_version", 2, "not a row of schema version 1"),
        ("row", None, "row: expected a text"),
        ("options", [], "options: expected a table"),
        ("outcome.bytes", 0, "outcome.bytes: expected a number above 0"),
        ("outcome.top1", "<script>", "outcome.top1: expected a number"),
        ("outcome.top1", float("nan"), "outcome.top1: expected "),
        ("outcome.dense_bytes", "many", "outcome.dense_bytes: expected a whole number"),
    ],
)
def test_a_foreign_line_is_named(tmp_path: Path, key: str, value: object, message: str) -> None:
    ledger = Ledger(tmp_path)
    ledger.append(entry("a"))
    facts = json.loads(entry("b").line())
    table, _, last = key.rpartition(".")
    (facts[table] if table else facts)[last] = value
    with ledger.path.open("a") as file:
        file.write(json.dumps(facts) + "\n")
    with pytest.raises(FormatError, match=re.escape(f"rows.jsonl, line 2: {message}")):
        ledger.entries()


@pytest.mark.parametrize("line", ["garbage", "[]", "null", '{"schema_version": 1}'])
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "rows.jsonl").write_text(line + "\n")
    with pytest.raises(FormatError, match=r"rows\.jsonl, line 1: "):
        Ledger(tmp_path).entries()
