"""compress check-data, as a user types it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from compressor.data import scan
from tests.helpers.file_commands import Ran, type_
from tests.helpers.pictures import write_folder

__all__ = ["type_"]  # the fixture

pytestmark = pytest.mark.usefixtures("own_folder", "one_worker")


def test_it_says_what_a_folder_holds(type_: Callable[..., Ran]) -> None:
    write_folder(Path("own"), {"train": 3, "val": 2, "test": 1})
    (Path("own") / "train" / "ant" / "9.png").write_bytes((Path("own") / "train" / "ant" / "0.png").read_bytes())
    code, out, err = type_("check-data", "own")
    assert (code, err) == (0, ["data               own: 10 train, 6 validation, 3 test images of 3 classes"])
    rows = [line.split() for line in out.splitlines()]
    assert rows[:2] == [["class", "train", "validation", "test"], ["ant", "4", "2", "1"]]
    assert rows[2:] == [["bee", "3", "2", "1"], ["cow", "3", "2", "1"]]
    code, out, _ = type_("check-data", "own", "--json")
    assert json.loads(out)["classes"][0] == {"name": "ant", "train": 4, "validation": 2, "test": 1}


def test_bad_images_are_named_however_many_there_are(
    type_: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "MOST_WHOLE", 0)
    write_folder(Path("own"), {"train": 2, "val": 2})
    whole = Path("own/val/bee/1.png").read_bytes()
    Path("own/val/bee/1.png").write_bytes(whole[: len(whole) // 2])
    code, out, err = type_("check-data", "own")
    assert (code, out, len(err)) == (4, "", 2)
    assert err[1].startswith("error: 1 of the images opened cannot be read, 0 allowed: validation: bee/1.png ")
    assert type_("check-data", "own", "--max-bad-images", "1")[0] == 0


def test_many_classes_are_cut_short(type_: Callable[..., Ran]) -> None:
    write_folder(Path("own"), {"train": 1, "val": 1}, tuple(f"c{number}" for number in range(22)))
    _, out, _ = type_("check-data", "own")
    assert out.splitlines()[-1] == "and 2 more classes: --all shows them"
    assert len(type_("check-data", "own", "--all")[1].splitlines()) == 23


def test_no_such_folder(type_: Callable[..., Ran]) -> None:
    assert type_("check-data", "none") == (4, "", ["error: none: no such folder"])
