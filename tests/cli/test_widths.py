"""What the commands print fits a terminal of 80 columns, also where COLUMNS alone says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from compressor.model_zoo import packed_path
from tests.helpers.file_commands import MODEL, Ran, type_
from tests.helpers.pictures import write_folder

__all__ = ["type_"]  # the fixture

pytestmark = pytest.mark.usefixtures("own_folder", "one_worker")
COLUMNS, TINY = 80, "zoo:test_resnet-tiny"
SAID = (
    ("--help",),
    ("help", "MODEL"),
    ("sweep", "--help"),
    ("eval", "--help"),
    ("schemes",),
    ("targets",),
    ("zoo", "list"),
    ("inspect", "zoo:resnet18-tiny"),
    ("inspect", TINY, "--all"),
    ("verify", "tiny.safetensors"),  # the path of a file is never broken, and the zoo's may be longer than a line
    ("diff", TINY, "zoo:test_resnet-balanced"),
    ("check-data", "own"),
    (MODEL, "--dry-run"),
    (MODEL, "--recipe", "mixed3", "--dry-run"),
    (MODEL, "--data-dir", "own", "--target-size", "60KB", "--dry-run"),
)


@pytest.mark.parametrize("words", SAID, ids=" ".join)
def test_lines_fit(words: tuple[str, ...], type_: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(Path("own"), {"train": 2, "val": 2})
    Image.new("RGB", (9, 9)).save("own/train/ant/odd.webp")
    Path("tiny.safetensors").write_bytes(packed_path(TINY).read_bytes())
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    code, out, err = type_(*words)
    assert code == 0, err
    lines = [*out.splitlines(), *err]
    assert lines
    assert not [line for line in lines if len(line) > COLUMNS]


def test_without_a_terminal_lines_are_whole(type_: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(Path("own"), {"train": 2, "val": 2})
    Image.new("RGB", (9, 9)).save("own/train/ant/odd.webp")
    monkeypatch.delenv("COLUMNS", raising=False)
    (line,) = type_("check-data", "own")[2]
    assert line.endswith("left out of train: 1 .webp (only .jpeg, .jpg, .png are read)")


def test_the_rule_goes_before_words_are_broken(type_: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    head, *_ = type_(MODEL, "--recipe", "mixed3", "--dry-run")[1].splitlines()
    assert head.split() == ["site", "shape", "weights", "plan"]
    monkeypatch.setenv("COLUMNS", "200")
    head, *_ = type_(MODEL, "--recipe", "mixed3", "--dry-run")[1].splitlines()
    assert head.split() == ["site", "shape", "weights", "plan", "rule"]
