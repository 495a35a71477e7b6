"""docs/hub.md: its Python runs against a hub, its commands exist, and what it lists is what is pushed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from compressor.cli.main import cli
from compressor.formats.io.hub import MOST_BYTES
from compressor.model_zoo import packed_path
from tests.helpers.hub_server import FakeHub, hub

__all__ = ["hub"]  # the fixture

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "hub.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # by the hub's client itself
def test_python_runs(hub: FakeHub, own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra hub")
    shutil.copy(packed_path("zoo:test_resnet-tiny"), own_folder / "small.safetensors")
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    exec(compile(block.replace("OWNER/NAME", "me/small"), "hub.md", "exec"), {})
    made = hub.repositories["me/small"]
    assert capsys.readouterr().out == f"hf-hub:me/small@{made.refs['main']}\n"
    files = re.findall(r"^\| `([\w.]+)` \|", PAGE, re.MULTILINE)
    assert {*files, ".gitattributes"} == made.commits[made.refs["main"]].keys()


def test_commands_and_options_exist() -> None:
    lines = [line.partition("#")[0].split() for line in re.findall(r"^compress (.*)", PAGE, re.MULTILINE)]
    assert len(lines) > 5
    for name, *words in lines:
        command = cli.commands.get(name, cli.commands["run"])
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known


def test_the_limit_is_stated() -> None:
    assert f"more than {MOST_BYTES >> 30} GiB are not fetched" in " ".join(PAGE.split())
