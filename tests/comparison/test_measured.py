"""Documents of other commands: those that are read, and those that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compressor.comparison.measured import TensorLoss, read_measured
from compressor.formats.errors import FormatError, MissingError
from compressor.report.class_flips import ClassFlips

ROW = {"name": "cat", "images": 4, "dense": 3, "packed": 2, "lost": 2, "gained": 1}
EVALUATED = {"content_sha256": "ab", "classes": [ROW, {**ROW, "name": "dog", "lost": 0, "gained": 0}]}
LOSS = {"site": "fc.weight", "rate": 1e-7, "measured": 0.5, "step": 1, "bits": 2.0}
SENSITIVE = {"model": {"name": "test_resnet", "args": {}}, "sensitivity": [LOSS]}


def written(folder: Path, *documents: Any) -> list[Path]:
    paths = [folder / f"{number}.json" for number in range(len(documents))]
    for path, document in zip(paths, documents, strict=True):
        path.write_text(document if isinstance(document, str) else json.dumps(document))
    return paths


def test_both_documents_are_read_and_classes_without_a_change_are_left_out(tmp_path: Path) -> None:
    paths = written(tmp_path, EVALUATED, SENSITIVE)
    found = read_measured(paths)
    assert found.classes == {"ab": (ClassFlips("cat", 4, 3, 2, 2, 1),)}
    assert found.losses == {"test_resnet": (TensorLoss("fc.weight", 1e-7, 0.5),)}
    assert found.paths == {"ab": paths[0], "test_resnet": paths[1]}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", r"0\.json: not JSON; expected what 'compress eval FILE --against DENSE --per-class --json' or"),
        ("[" * 100_000, r"0\.json: not JSON; expected"),
        ([], r"0\.json: expected what 'compress eval"),
        ({"top1": {}}, r"0\.json: not what .* prints: content_sha256: is missing"),
        (
            {"content_sha256": "ab", "classes": [{"name": "cat", "images": 1, "packed": 1}]},
            r"prints: classes\.0\.dense",
        ),
        (
            {**EVALUATED, "classes": [{**ROW, "lost": -1}]},
            r"classes\.0\.lost: expected at least 0",
        ),
        ({**SENSITIVE, "model": None}, r"prints: model: "),
        ('{"model": {"name": "x"}, "sensitivity": [{"site": "a", "rate": 1, "measured": NaN}]}', r"finite number"),
    ],
)
def test_anything_else_is_refused_in_one_line(tmp_path: Path, document: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message) as refused:
        read_measured(written(tmp_path, document))
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"--measured .*none\.json: cannot be read \(No such file"):
        read_measured([tmp_path / "none.json"])
