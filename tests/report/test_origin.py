"""What a packed file says about itself, in words; much of it, or none, may be there, and none of it can be trusted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from compressor.formats.content import Content
from compressor.formats.file.reader import PackedFile
from compressor.formats.file.writer import pack
from compressor.report.report import Report
from tests.helpers.file_commands import small

NAMES = [f"class {number}" for number in range(12)]
LABELS = {"mean": [0.5], "std": [0.25], "input_size": [1, 32, 32], "label_names": NAMES}
TRAINED = {"epochs": 1, "opt": "sgd", "lr": 0.1, "sched": "step", "batch_size": 8, "distill": 0.25}
RULES = [
    {"match": "one.*", "scheme": "kmeans", "codewords": 4},
    {"match": "two", "ignore": True},
    {"match": "*", "scheme": "learnt", "codewords": 16, "rate": 1e-7, "sparsity": 0.5},
]
FACTS = {
    "data": {"name": "mine", "version": "1", "split": "test", "n": 400},
    "top1": {"dense": 0.9, "packed": 0.875},
    "versions": {"timm": "1.0"},
    "seed": 3,
}


def heading(width: int = 200, **changes: Any) -> list[str]:
    content: Content = small(**changes)
    with PackedFile.from_bytes(pack(content)) as file:
        return Report.of(file).heading(width).splitlines()


def test_a_file_says_all_that_is_known_of_it() -> None:
    lines = heading(
        model={"name": "test_resnet", "args": {"num_classes": 12}},
        preprocessing=LABELS,
        recipe={"stage": [{"epochs": 0, "rule": RULES[:1]}, {**TRAINED, "rule": RULES}]},
        provenance=FACTS,
    )
    assert lines == [
        "model     test_resnet(num_classes=12)",
        "shared    one.*: kmeans, codewords 4; two: left alone; all others: learnt, rate 1e-07, sparsity 0.5",
        "trained   not, values were shared only; then 1 epoch, sgd, lr 0.1, step, batches of 8, distilled 0.25",
        "images    1x32x32, mean 0.5, std 0.25",
        f"classes   12: {', '.join(NAMES[:10])} and 2 more",
        "made by   timm 1.0; seed 3",
        # Of 350 right among 400, by the calculator of any book on Wilson's score.
        "accuracy  top-1 on 400 test images of mine  dense 90.0 % -> packed file 87.5 %  95 % interval [83.9, 90.4], "
        "as recorded when it was written",
    ]


def test_a_file_of_no_model_says_so_alone() -> None:
    assert heading() == ["model     not one of timm's: it is loaded into a module of yours"]


@pytest.mark.parametrize(
    "recipe",
    [
        {"stage": []},
        {"stage": [{}]},
        {"stage": [{"epochs": "many", "rule": []}]},
        {"stage": [{"epochs": [1], "rule": [{"match": "*", "codewords": {}}]}]},
        {"stage": [{"epochs": 1, "opt": ["a"], "rule": [{"match": "a", "scheme": "b" * 999}]}]},
    ],
)
def test_a_recipe_of_another_form_does_no_harm(recipe: dict[str, Any]) -> None:
    lines = heading(80, recipe=recipe)
    assert all(line.isprintable() and len(line) <= 80 for line in lines)
    assert len(lines) < 12


def test_the_report_of_a_file_is_brief_and_fits_a_notebook() -> None:
    content = replace(small(), model={"name": "test_resnet", "args": {}}, provenance=FACTS)
    with PackedFile.from_bytes(pack(content)) as file:
        report = Report.of(file)
    totals = report.totals
    assert repr(report) == (
        f"<Report: test_resnet, {totals.dense:,} -> {totals.file:,} bytes, {totals.ratio:.2f} times smaller, "
        "top-1 87.5 %>"
    )
    page = report._repr_html_()
    assert page.count("<tr>") == 1 + len(report.rows)
    assert "dense 90.0 % -&gt; packed file 87.5 %" in page
    assert str(report).startswith(report.heading())


def test_text_of_a_file_is_escaped_in_a_notebook() -> None:
    recipe = {"stage": [{"rule": [{"match": "<script>", "scheme": "<b>"}]}]}
    with PackedFile.from_bytes(pack(small(recipe=recipe, provenance={"rules": [0, 0, 0]}))) as file:
        page = Report.of(file)._repr_html_()
    assert "<script>" not in page
    assert "<b>" not in page
    assert "&lt;b&gt;" in page
