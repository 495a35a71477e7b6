"""The page: it is one file, says what the files say, and escapes whatever strangers have written."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="needs the extra report")

from compressor.comparison.details import Details
from compressor.comparison.front import Bounds
from compressor.comparison.measured import TensorLoss
from compressor.comparison.page import Comparison, page
from compressor.comparison.points import Configuration, Point, configurations, point_of_file
from compressor.formats.file.reader import PackedFile
from compressor.formats.file.writer import write
from compressor.model_zoo import checkpoint, packed_path
from compressor.report.class_flips import ClassFlips
from compressor.report.runtime_size import RuntimeSize
from tests.helpers.file_commands import small

# Without a blank, which would part the names of tensors.
EVIL = r"<script>alert('$\frac$')</script><img/src=https://evil.example/x/onerror=alert(2)>--!>"


class Elements(HTMLParser):
    """The elements of a page and their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def zoo_page() -> str:
    points, details = [], []
    for name in ("test_resnet-tiny", "test_resnet-balanced"):
        path = packed_path(f"zoo:{name}")
        with PackedFile.open(path) as file:
            points.append(point_of_file(path, file, f"compress {name}"))
            details.append((points[-1], Details.of(file, None, None)))
    return page(Comparison(configurations(points), details[:1], Bounds(size=40_000)))


@pytest.fixture(scope="module")
def evil_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page of a file whose names are hostile, in a sweep of a hostile name."""
    path = tmp_path_factory.mktemp("evil") / "evil.safetensors"
    sites = {f"{EVIL}{name}": site for name, site in small().sites.items()}
    write(path, small(sites=sites, aliases={}))
    summary = path.with_name("epochs.csv")
    summary.write_text(f"epoch,train_loss,eval_top1\n0,{EVIL},12\n1,0.5,nan\nx,1,1\n")
    options = {"recipe": EVIL, "seed": 0}
    point = Point(EVIL, EVIL, 100, 200, EVIL, 10, 0.5, 0.6, f"compress {EVIL}", options, path, summary)
    with PackedFile.open(path) as file:
        details = Details.of(
            file, summary, {f"{EVIL}one.weight": np.ones((8, 8), np.float32)},
            losses=[TensorLoss(f"{EVIL}one.weight", 1e-7, 0.5), TensorLoss("not here", 1e-7, 0.0)],
            classes=(ClassFlips(EVIL, 4, 3, 2, 2, 1),),
            runtimes=[RuntimeSize(EVIL, EVIL, 30), RuntimeSize("x", "", None, EVIL)],
        )  # fmt: skip
    return page(Comparison([Configuration(EVIL, (point,))], [(point, details)], Bounds()))


@pytest.fixture(params=["zoo_page", "evil_page"])
def text(request: pytest.FixtureRequest) -> str:
    found: str = request.getfixturevalue(request.param)
    return found


def test_nothing_is_loaded_from_elsewhere(text: str) -> None:
    elements = Elements(text)
    assert not [
        one for one in elements.found if one[0] in ("link", "img", "iframe", "object", "embed", "image", "base")
    ]
    for tag, attributes in elements.found:
        for key, value in attributes.items():
            if key in ("src", "href", "xlink:href", "action", "data", "srcset"):
                assert (value or "").startswith("#"), (tag, key, value)
            assert not key.startswith("on"), (tag, key)
    assert not re.search(r"url\((?!#)", text)
    assert "@import" not in text


def test_the_only_script_is_the_page_s_own(text: str) -> None:
    assert len(Elements(text).named("script")) == 1
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [one["content"] or "" for one in Elements(text).named("meta") if "http-equiv" in one]
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def test_ids_are_each_of_one_element_and_those_named_exist(text: str) -> None:
    ids = [attributes["id"] for _, attributes in Elements(text).found if "id" in attributes]
    assert ids
    assert len(ids) == len(set(ids))
    named = {*re.findall(r"url\(#([^)]*)\)", text), *re.findall(r'href="#([^"]*)"', text)}
    assert named
    assert named <= set(ids)


def test_hostile_strings_are_shown_as_they_are(evil_page: str) -> None:
    assert "&lt;script&gt;alert(&#39;$\\frac$&#39;)" in evil_page
    assert "alert('$" not in evil_page


def test_the_page_has_figures_choices_and_commands(zoo_page: str) -> None:
    entry = checkpoint("test_resnet-tiny")
    assert f"{entry.bytes:,}" in zoo_page
    assert f"{100 * entry.top1:.2f} %" in zoo_page
    assert "<h3>Quality, balanced, compact</h3>" in zoo_page  # the other file is beyond the bound
    assert "<pre><span>compress</span> <span>test_resnet-tiny</span></pre>" in zoo_page
    assert zoo_page.count("<svg ") == 2 + 3  # the front, wide and narrow; of one file its bytes, bits and weights
    assert "prefers-color-scheme: dark" in zoo_page
    assert "#010203" not in zoo_page  # the ink of pictures is that of the page


def test_what_was_measured_of_a_file_is_shown(tmp_path: Path) -> None:
    write(path := tmp_path / "a.safetensors", small())
    classes = [ClassFlips(f"class {number}", 10, 9, 9 - number % 2, number % 2, 0) for number in range(40)]
    losses = [TensorLoss("three.weight", price, price * 1e4) for price in (1e-7, 1e-6)]
    runtimes = [RuntimeSize("a runtime", "What it is.", 2_000), RuntimeSize("another", "", None, "needs something")]
    with PackedFile.open(path) as file:
        point = point_of_file(path, file)
        details = Details.of(file, None, None, losses=losses, classes=classes, runtimes=runtimes)
        text = page(Comparison(configurations([point]), [(point, details)], Bounds()))
        none = Details.of(file, None, None, classes=())
        plain = page(Comparison(configurations([point]), [(point, none)], Bounds()))
    assert "<figcaption>sensitivity: each tensor alone rounded at a price of a bit</figcaption>" in text
    assert text.count("<td>class ") == 30
    assert "The 30 of 40 classes with most of them. Lost are images" in text
    assert "20 in all; gained is the reverse, 0 in all." in text
    sizes = {"a runtime": 2_000, "packed": path.stat().st_size, "dense": point.dense_bytes, "another": 1 << 40}
    assert sorted(sizes, key=lambda name: text.index(f"<td>{name}</td>")) == sorted(sizes, key=lambda name: sizes[name])
    assert '<td class="prose">needs something</td>' in text
    assert "No image is answered otherwise" in plain
    assert "sensitivity" not in plain
    assert "runtime" not in plain


def test_the_same_files_give_the_same_page(zoo_page: str) -> None:
    path = packed_path("zoo:test_resnet-tiny")
    pages = []
    for _ in range(2):
        with PackedFile.open(path) as file:
            pages.append(page(Comparison(configurations([point_of_file(path, file)]), [], Bounds())))
    assert pages[0] == pages[1]


def test_without_accuracy_there_is_no_front(tmp_path: Path) -> None:
    write(path := tmp_path / "a.safetensors", small())
    with PackedFile.open(path) as file:
        point = point_of_file(path, file)
        text = page(Comparison(configurations([point]), [(point, Details.of(file, None, None))], Bounds(size=1)))
    assert "Accuracy against size" not in text
    assert "three.weight" in text


def test_epochs_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    write(path := tmp_path / "a.safetensors", small())
    summary = tmp_path / "a.summary.csv"
    summary.write_text("epoch,train_loss,eval_top1,lr\n0,1.5,,0.1\n1,abc,50.0,0.1\ngarbage\n")

    def epochs(of: Path) -> Any:
        with PackedFile.open(path) as file:
            return Details.of(file, of, None).epochs

    assert [dict(epoch) for epoch in epochs(summary)] == [
        {"epoch": 0, "train_loss": 1.5, "lr": 0.1},
        {"epoch": 1, "eval_top1": 50.0, "lr": 0.1},
    ]
    assert epochs(tmp_path / "none.csv") == []
