"""The page in a browser: it sorts, says nothing on the console, and nothing of it is cut off."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from compressor.cli.main import run

pytest.importorskip("matplotlib", reason="needs the extra report")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome"),
]

# What is asked of the page, in a copy that lets it run: how wide things are, and the order of rows after clicks.
PROBE = """
<script>
const sizes = () => [...document.querySelector("table").tBodies[0].rows].map((row) => row.cells[COLUMN].textContent);
const heads = [...document.querySelector("table").tHead.rows[0].cells];
const COLUMN = heads.findIndex((head) => head.textContent === "bytes");
const found = { before: sizes() };
heads[COLUMN].firstElementChild.click(); found.up = sizes(); found.upState = heads[COLUMN].ariaSort;
heads[COLUMN].firstElementChild.click(); found.down = sizes(); found.downState = heads[COLUMN].ariaSort;
heads[0].firstElementChild.click(); found.states = heads.map((head) => head.ariaSort);
found.names = [...document.querySelector("table").tBodies[0].rows].map((row) => row.cells[0].textContent);
document.querySelectorAll("details").forEach((one) => { one.open = true; });
found.width = innerWidth; found.page = document.documentElement.scrollWidth;
found.cut = [...document.querySelectorAll("body *:not(svg *)")].filter((one) => one.getClientRects().length
  && !one.closest(".scroll") && one.tagName !== "svg"
  && (one.scrollWidth > one.clientWidth + 1 && getComputedStyle(one).display !== "inline"
    || one.getBoundingClientRect().right > innerWidth + 1)).map((one) => one.outerHTML.slice(0, 80));
found.shown = [...document.querySelectorAll("section figure svg")].filter((one) => one.getClientRects().length).length;
found.ink = getComputedStyle(document.body).color;
parent.postMessage("FOUND" + JSON.stringify(found) + "FOUND", "*");
</script>
"""
# A frame may be as narrow as a telephone, a window may not.
FRAME = """
<!doctype html><script>addEventListener("message", (event) => document.body.append(event.data));</script>
<body><iframe src="copy.html" width="{width}" height="900" style="border: 0"></iframe>
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    names = ("zoo:test_resnet-tiny", "zoo:resnet18-balanced", "zoo:test_vit-balanced", "zoo:test_resnet-balanced")
    assert run(["report", *names, "-o", str(path)]) == 0
    return path


def browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *options]
    done = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def probe(report: Path, tmp_path: Path, width: int, *options: str) -> dict[str, Any]:
    text = report.read_text(encoding="utf-8")
    policy = re.compile(r"<meta http-equiv=[^>]*>")
    assert policy.search(text)
    copy = tmp_path / "copy.html"
    copy.write_text(policy.sub("", text).replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(width=width), encoding="utf-8")
    shown = browse(frame, "--window-size=1400,1000", "--virtual-time-budget=10000", *options).stdout
    (found,) = re.findall(r"FOUND(.*)FOUND", shown)
    answer: dict[str, Any] = json.loads(found.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    return answer


def test_the_console_is_silent_under_the_page_s_own_policy(report: Path, tmp_path: Path) -> None:
    assert "CONSOLE" not in browse(report).stderr
    wrong = tmp_path / "wrong.html"  # what would be seen of a request, a foreign script, an error
    wrong.write_text(
        report.read_text(encoding="utf-8").replace("</body>", "<script>1</script></body>"), encoding="utf-8"
    )
    assert "CONSOLE" in browse(wrong).stderr


def test_columns_sort_by_click(report: Path, tmp_path: Path) -> None:
    found = probe(report, tmp_path, 1280)
    sizes = sorted(int(text.replace(",", "")) for text in found["before"])
    assert len(set(sizes)) == 4
    assert [int(text.replace(",", "")) for text in found["up"]] == sizes
    assert [int(text.replace(",", "")) for text in found["down"]] == sizes[::-1]
    assert (found["upState"], found["downState"]) == ("ascending", "descending")
    assert found["names"] == sorted(found["names"])
    assert [state for state in found["states"] if state] == ["ascending"]


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize(("scheme", "ink"), [(1, "rgb(29, 33, 38)"), (0, "rgb(230, 232, 234)")])
def test_nothing_is_cut_off_in_light_and_dark(report: Path, tmp_path: Path, width: int, scheme: int, ink: str) -> None:
    found = probe(report, tmp_path, width, f"--blink-settings=preferredColorScheme={scheme}")
    assert found["width"] == width
    assert found["page"] <= width
    assert found["cut"] == []
    assert found["shown"] == 1 + 4 * 3  # one of the two fronts, and the pictures of four files
    assert found["ink"] == ink
