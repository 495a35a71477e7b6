"""docs/results.md: tables, readings and figures are those of the committed rows, and its commands can be typed."""

from __future__ import annotations

import json
import re
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from compressor.cli.main import cli
from compressor.model_zoo import list_recipes

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
PUBLISHED: list[dict[str, str]] = tomllib.loads((ROOT / "benchmarks" / "literature.toml").read_text(encoding="utf-8"))[
    "row"
]


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script that makes the page; scripts of benchmarks import each other by their names."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import results_page  # type: ignore[import-not-found, unused-ignore]

    yield results_page
    parts = ("allowed_weights_page", "peers_page", "post_training_page", "rate_curves", "sizes_page", "figures", "page")
    for name in ("results_page", *parts):
        sys.modules.pop(name, None)


def test_tables_and_readings_are_those_of_the_rows(page: Any) -> None:
    written = dict(re.findall(r"<!-- (.+?) -->\n(.*?)\n?<!-- end -->", TEXT, re.DOTALL))
    assert written == page.parts()


def test_figures_show_the_rows(page: Any) -> None:
    from figures import NOTE, digest  # type: ignore[import-not-found, unused-ignore]

    for name, points in page.figures().items():
        assert f"figures/{name}" in TEXT
        with Image.open(page.FIGURES / name) as picture:
            assert picture.info[NOTE] == digest(points), f"{name}: run benchmarks/results_page.py"


def test_the_readme_takes_its_figure_and_ratios_from_the_page(page: Any) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"docs/figures/(.+?)\)", readme)) == {"sizes.png"} <= set(page.figures())
    low, high = re.findall(r"such files take ([\d.]+) to ([\d.]+)\s+of\s+the bytes of NNCodec's", readme)[0]
    rows = page.parts()["post_training summary"].splitlines()[2:-1]
    ratios = sorted(float(row.split("|")[4].split()[0]) for row in rows)
    assert [low, high] == [f"{ratio:.2f}" for ratio in (ratios[0], ratios[-1])]


def test_no_row_was_measured_twice() -> None:
    for name, what in (
        ("allowed_weights", ("net", "series", "settings", "seed")),
        ("peers", ("net", "method", "setting", "seed", "epochs", "images")),
    ):
        path = ROOT / "benchmarks" / "results" / f"{name}.jsonl"
        keys = [json.dumps([row[key] for key in what]) for row in map(json.loads, path.read_text().splitlines())]
        assert len(keys) == len(set(keys))


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row['network']} {row['method']}")
def test_published_numbers_name_a_source_that_can_be_opened(row: dict[str, str]) -> None:
    assert set(row) == {"network", "method", "dense", "compressed", "size", "source"}
    assert re.search(r"\]\(https://", row["source"])
    assert all("|" not in cell for cell in row.values())


def test_commands_are_parsed_and_name_recipes_of_the_package() -> None:
    lines = [
        line
        for block in re.findall(r"^```sh\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
        for line in block.splitlines()
    ]
    assert len(lines) > 3
    for line in lines:
        words = shlex.split(line)[1:]
        command = cli.commands["sweep" if words[0] == "sweep" else "run"]
        context = command.make_context("compress", words[words[0] == "sweep" :])
        assert context.params["recipe"] in (*list_recipes(), *((name,) for name in list_recipes()))
