"""The site: it builds without a warning, its tutorial has run, nothing is asked of other hosts, nothing is cut off."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from importlib.util import find_spec
from pathlib import Path

import pytest

import compressor
from compressor import SCHEMES

ROOT = Path(__file__).resolve().parents[2]
TUTORIAL = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8"))
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAGES = [
    "",
    "tutorial",
    "schemes",
    "deploy",
    "write-a-scheme",
    "reference/compressor",
    "reference/schemes",
    "benchmarks",
]

# Pages in frames as narrow as a telephone: how wide is each, and which text is neither in it nor in what scrolls?
FRAMES = """
<!doctype html><body><script>
const pages = %s, found = {};
for (const page of pages) {
  const frame = document.createElement("iframe");
  frame.width = %d; frame.height = 800; frame.src = page ? `${page}/index.html` : "index.html";
  frame.onload = () => setTimeout(() => {
    const inner = frame.contentDocument, width = inner.documentElement.clientWidth;
    const isCut = (one) => one.getClientRects().length && one.getBoundingClientRect().right > width + 1
      && !one.closest("pre, .md-typeset__scrollwrap, .md-typeset__table, table, code");
    found[page] = { width: inner.documentElement.scrollWidth - width,
      cut: [...inner.querySelectorAll(".md-content *")].filter(isCut).map((one) => one.outerHTML.slice(0, 80)),
      paragraphs: inner.querySelectorAll(".md-content p").length };
    if (Object.keys(found).length === pages.length) document.body.append("FOUND" + JSON.stringify(found) + "FOUND");
  }, 300);
  document.body.append(frame);
}
</script>
"""


def test_the_tutorial_is_stored_without_outputs() -> None:
    cells = [cell for cell in TUTORIAL["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("mkdocs", "material", "mkdocstrings", "mkdocs_click", "nbconvert", "ipykernel"):
        if find_spec(name) is None:
            pytest.skip(f"needs the extra docs: there is no {name}")
    folder = tmp_path_factory.mktemp("site")
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([ROOT / "scripts" / "docs", folder], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_tutorial_has_run(site: Path) -> None:
    text = re.sub(r"<[^>]+>", "", text_of(site / "tutorial" / "index.html"))
    dense, rounded, packed = (
        float(found) for found in re.findall(r"^(?:dense|rounded|packed).*top-1 ([\d.]+) %", text, re.M)
    )
    assert rounded < packed
    assert dense > 90
    before, after = (
        int(size.replace(",", "")) for size in re.findall(r"^([\d,]+) -&gt; ([\d,]+) bytes", text, re.M)[0]
    )
    assert 10 * after < before
    assert "\nResNet, the same logits: True\n" in text


@pytest.mark.slow
def test_nothing_is_asked_of_other_hosts(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 50
    for page in pages:
        tags = re.findall(r"<(?:link|script|img|iframe|source)\b[^>]*>", text_of(page))
        assert not [tag for tag in tags if re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag)], page
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"""url\(["']?(?:https?:)?//|@import""", text_of(sheet)), sheet


@pytest.mark.slow
def test_every_page_and_decision_is_there(site: Path) -> None:
    assert len(list(site.glob("decisions/*/index.html"))) == len(list((ROOT / "docs" / "decisions").glob("*.md")))
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / page.stem / "index.html").exists()


@pytest.mark.slow
def test_the_reference_has_what_is_public_and_what_pages_import(site: Path) -> None:
    listed = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    known = {line.split(" ")[0] for line in listed.splitlines()}
    names = [("compressor", name) for name in compressor.__all__ if name != "__version__"]
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for module, imported in re.findall(r"^from (compressor[\w.]*) import (.+)$", "\n".join(map(text_of, pages)), re.M):
        names += [(module, name) for name in imported.split(", ") if module != "compressor"]
    assert len(names) > 30
    missing = set()
    for module, name in names:
        value = getattr(importlib.import_module(module), name)
        home = getattr(value, "__module__", module)
        missing |= set() if {f"{module}.{name}", f"{home}.{name}"} & known else {f"{module}.{name}"}
    assert not missing


@pytest.mark.slow
def test_every_scheme_has_its_entry(site: Path) -> None:
    text = text_of(site / "reference" / "schemes" / "index.html")
    for name in SCHEMES.built_in():
        cls = SCHEMES.find(name)
        assert f'id="{cls.__module__}.{cls.__qualname__}"' in text


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome")
@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_is_wider_than_its_window(site: Path, width: int) -> None:
    (site / "frames.html").write_text(FRAMES % (json.dumps(PAGES), width))
    options = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--virtual-time-budget=20000",
    )
    command = [str(BROWSER), *options, "--window-size=1400,900", "--dump-dom", (site / "frames.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = json.loads(done.stdout.split("FOUND")[-2])
    assert found.keys() == set(PAGES)
    for page, seen in found.items():
        assert seen["paragraphs"] > 2, page
        assert (seen["width"], seen["cut"]) == (0, []), page
