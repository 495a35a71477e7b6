"""``compress report``: what it writes, and what it refuses before."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compressor.formats.content import SharedTensor
from compressor.formats.file.reader import PackedFile
from compressor.formats.file.writer import write
from compressor.model_zoo import checkpoint, packed_path
from compressor.report.class_flips import ClassFlips
from compressor.sweep.ledger import Entry, Ledger
from compressor.sweep.outcome import Outcome
from tests.helpers.file_commands import Ran, small, type_

__all__ = ["type_"]  # the fixture

TINY, LARGER = "zoo:test_resnet-tiny", "zoo:test_resnet-balanced"


@pytest.fixture(autouse=True)
def _here(own_folder: Path) -> None:
    pass


def rows(out: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(out)))


def test_csv_of_files(type_: Callable[..., Ran]) -> None:
    code, out, err = type_("report", LARGER, TINY, "--format", "csv")
    assert (code, err) == (0, [])
    first, second = rows(out)
    entry = checkpoint("test_resnet-tiny")
    assert (first["configuration"], int(first["bytes"]), first["command"]) == (
        "test_resnet-tiny",
        entry.bytes,
        entry.command,
    )
    assert abs(float(first["top-1, %"]) - 100 * entry.top1) < 0.005
    assert first["95 % interval"] == " to ".join(f"{100 * end:.2f}" for end in entry.interval)
    assert second["configuration"] == "test_resnet-balanced"


def test_a_page_and_pictures_are_written_and_not_replaced(type_: Callable[..., Ran]) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra report")
    code, out, err = type_("report", TINY, "--png", "pictures")
    assert (code, out) == (0, "")
    page = Path("report.html").read_text(encoding="utf-8")
    assert err == [f"report.html  1 configuration, {len(page.encode()):,} bytes", "pictures  4 pictures"]
    pictures = sorted(Path("pictures").iterdir())
    assert [one.name for one in pictures] == ["file-1-1.png", "file-1-2.png", "file-1-3.png", "front-1.png"]
    assert all(one.read_bytes().startswith(b"\x89PNG") for one in pictures)
    code, _, (line,) = type_("report", TINY)
    assert (code, line) == (2, "error: report.html exists: give another name, or --force to replace it")
    Path("pictures/front-1.png").write_bytes(b"mine")
    code, out, (line,) = type_("report", TINY, "-o", "other.html", "--png", "pictures")
    assert (code, out) == (2, "")
    assert line == "error: pictures/front-1.png exists: give another name, or --force to replace it"
    assert not Path("other.html").exists()
    assert Path("pictures/front-1.png").read_bytes() == b"mine"


def test_a_folder_that_cannot_be_made_is_one_line_and_nothing_is_written(
    type_: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra report")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    code, out, (line,) = type_("report", TINY, "--format", "csv", "-o", "table.csv", "--png", "pictures")
    assert (code, out, line) == (6, "", "error: folder pictures cannot be made (Permission denied)")
    assert not Path("table.csv").exists()


@pytest.mark.parametrize("words", [["inspect", "--all"], ["inspect", "--json"], ["report"]])
def test_a_shared_tensor_may_have_no_weights(type_: Callable[..., Ran], words: list[str]) -> None:
    if words == ["report"]:
        pytest.importorskip("matplotlib", reason="needs the extra report")
    empty = SharedTensor((0, 8), 0, np.zeros(0, np.uint8))
    write("some.safetensors", small(sites={**small().sites, "empty.weight": empty}))
    write("none.safetensors", small(sites={"empty.weight": empty}, books=small().books[:1], aliases={}))
    for file in ("some.safetensors", "none.safetensors"):
        code, out, err = type_(*words, file, *(["-o", f"{file}.html"] if words == ["report"] else []))
        assert code == 0, err
        shown = out or Path(f"{file}.html").read_text(encoding="utf-8")
        assert "empty.weight" in shown
        assert "NaN" not in shown


def sweep(folder: Path, classes: tuple[ClassFlips, ...] | None = None) -> Ledger:
    """A sweep of two configurations, one with two seeds, whose files are those of the zoo."""
    ledger = Ledger(folder)
    ledger.rows.mkdir(parents=True)
    for bits, seed, name, top1 in ((2, 0, "tiny", 0.91), (2, 1, "tiny", 0.93), (4, 0, "balanced", 0.935)):
        entry = checkpoint(f"test_resnet-{name}")
        row = f"bits{bits}-seed{seed}"
        shutil.copy(packed_path(f"zoo:{entry.name}"), ledger.rows / f"{row}.safetensors")
        outcome = Outcome(
            "test_resnet", f"elsewhere/{row}.safetensors", entry.bytes, 1_509_760, entry.parameters, 10_000
        )
        outcome = replace(
            outcome, top1=top1, dense_top1=0.9318, low=0.9, high=0.95, lost=10, gained=5 + seed, classes=classes
        )
        ledger.append(Entry(row, {"bits": bits, "seed": seed}, f"compress test_resnet --seed {seed}", 1.0, outcome))
    return ledger


def test_a_sweep_is_read_wherever_it_is_and_seeds_are_averaged(type_: Callable[..., Ran], tmp_path: Path) -> None:
    sweep(tmp_path / "sweep")
    code, out, err = type_("report", "sweep", TINY, "--format", "csv")
    assert (code, err) == (0, [])
    named = {row["configuration"]: row for row in rows(out)}
    assert set(named) == {"bits2", "bits4-seed0", "test_resnet-tiny"}
    assert (named["bits2"]["files"], named["bits2"]["top-1, %"], named["bits2"]["deviation"]) == ("2", "92.00", "1.41")
    assert named["bits2"]["gained"] == "5.5"
    assert named["bits2"]["images of"] == named["test_resnet-tiny"]["images of"] == "fashion-mnist, test"
    worth = {name: row["worth having"] for name, row in named.items()}
    assert worth == {"bits2": "no", "bits4-seed0": "yes", "test_resnet-tiny": "yes"}  # which is the smallest


def test_two_sweeps_and_two_files_of_one_name_stay_apart(type_: Callable[..., Ran], tmp_path: Path) -> None:
    for name, checkpoint_name in (("a", "tiny"), ("b", "balanced")):
        sweep(tmp_path / name)
        shutil.copy(packed_path(f"zoo:test_resnet-{checkpoint_name}"), f"{name}/same.safetensors")
    code, out, _ = type_("report", "a", "b", "a", "a/same.safetensors", "b/same.safetensors", "--format", "csv")
    assert code == 0
    found = {row["configuration"]: row for row in rows(out)}
    assert {name: row["files"] for name, row in found.items()} == {
        "a/bits2": "2", "a/bits4-seed0": "1", "a/same": "1", "b/bits2": "2", "b/bits4-seed0": "1", "b/same": "1",
    }  # fmt: skip
    assert all(f"{name}/same.safetensors" in found[f"{name}/same"]["command"] for name in "ab")


def test_the_page_of_a_sweep_shows_the_files_of_its_front(type_: Callable[..., Ran], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra report")
    ledger = sweep(tmp_path / "sweep")
    (ledger.rows / "bits4-seed0.safetensors").unlink()  # may be gone
    code, _, _ = type_("report", "sweep", "-o", "page.html", "--bound", "92.5%")
    assert code == 0
    page = Path("page.html").read_text(encoding="utf-8")
    assert page.count("<details") == 1
    assert "92.00 ± 1.41 %" not in page  # below the bound
    assert "<pre><span>compress</span> <span>test_resnet</span> <span>--seed</span> <span>0</span></pre>" in page


def test_what_was_measured_is_shown_with_the_file_and_the_model_it_is_of(
    type_: Callable[..., Ran], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra report")
    with PackedFile.open(packed_path(TINY)) as file:
        content = file.content_sha256()
    row = {"name": "Sandal", "images": 1_000, "dense": 990, "packed": 985, "lost": 8, "gained": 3}
    Path("eval.json").write_text(json.dumps({"content_sha256": content, "classes": [row]}))
    loss = {"site": "fc.weight", "rate": 1e-7, "measured": 0.25}
    Path("loss.json").write_text(json.dumps({"model": {"name": "test_resnet"}, "sensitivity": [loss]}))
    words = "--measured", "eval.json", "--measured", "loss.json"
    code, _, _ = type_("report", TINY, *words)
    page = Path("report.html").read_text(encoding="utf-8")
    assert code == 0
    assert "<td>Sandal</td>" in page
    assert "sensitivity: each tensor alone" in page
    code, _, (line,) = type_("report", LARGER, *words, "-o", "other.html")
    wanted = "error: --measured eval.json: of a packed file that is not shown one by one; name it as FILE"
    assert (code, line) == (2, wanted)
    code, _, (line,) = type_("report", "zoo:resnet18-tiny", *words[2:], "-o", "other.html")
    wanted = "error: --measured loss.json: of the model test_resnet; those of the files shown: resnet18"
    assert (code, line) == (2, wanted)
    assert not Path("other.html").exists()
    code, _, (line,) = type_("report", TINY, *words, "-o", "eval.json", "--force")
    assert code == 2
    assert "eval.json" in line
    assert json.loads(Path("eval.json").read_text())["classes"] == [row]
    code, _, (line,) = type_("report", TINY, *words, "--format", "csv")
    assert (code, line) == (2, "error: --measured is for the page: leave it out with --format csv")


def test_the_classes_of_a_row_are_shown(type_: Callable[..., Ran], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra report")
    ledger = sweep(tmp_path / "sweep", (ClassFlips("Ankle boot", 1_000, 960, 955, 9, 4),))
    assert [
        key for key in ledger.folder.joinpath("rows.csv").read_text().splitlines()[0].split(",") if "class" in key
    ] == []
    assert type_("report", "sweep", "-o", "page.html")[0] == 0
    assert "<td>Ankle boot</td>" in Path("page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["empty"], 4, "empty: no rows of a sweep in this folder: expected empty/rows.jsonl, of 'compress sweep'"),
        (["none.safetensors"], 4, "none.safetensors"),
        ([TINY, "--bound", "much"], 2, "--bound much: expected a size, as 450KB, or a top-1, as 92%"),
        ([TINY, "--bound", "120%"], 2, "--bound 120%: expected a size, as 450KB, or a top-1, as 92%"),
        ([TINY, "--bound", "9%", "--bound", "8%"], 2, "--bound 8%: there is one of that kind already"),
        ([TINY, "-o", "no/report.html"], 6, "/no does not exist: make it first"),
        ([TINY, "--png", "no/pictures"], 6, "folder no does not exist: make it first"),
    ],
)
def test_refusals(type_: Callable[..., Ran], words: list[str], code: int, message: str) -> None:
    Path("empty").mkdir()
    got, out, (line,) = type_("report", *words)
    assert (got, out) == (code, "")
    assert message in line
    assert not Path("report.html").exists()
