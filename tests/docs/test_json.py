"""docs/json.md names every key of the documents, and the documents have what it names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from compressor.cli.about import PACKAGES
from compressor.cli.main import cli
from compressor.report.schema import SCHEMA_VERSION, with_units
from tests.helpers.file_commands import MODEL, Ran, timm_file, type_
from tests.helpers.pictures import write_folder

__all__ = ["timm_file", "type_"]  # the fixtures

pytestmark = pytest.mark.usefixtures("one_worker")

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "json.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE))
COMMON = {"schema_version", "units", "command", "date", "seconds", "versions"}


def keys(section: str) -> set[str]:
    """Return the keys that the tables of a section describe."""
    (text,) = [text for title, text in SECTIONS.items() if title.startswith(section)]
    return set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))


def test_what_all_documents_have(type_: Callable[..., Ran], timm_file: Path) -> None:
    assert keys("What all") == COMMON
    words = ("inspect", str(timm_file), "--json")
    found = json.loads(type_(*words)[1])
    assert next(iter(found)) == "schema_version"
    assert found.keys() >= COMMON
    assert (found["schema_version"], found["command"]) == (SCHEMA_VERSION, ["compress", *words])
    assert timedelta() <= datetime.now(UTC) - datetime.fromisoformat(found["date"]) < timedelta(minutes=10)
    assert found["seconds"] >= 0
    assert found["versions"] == {name: version(name) for name in ("timm-compressor", "timm", "torch")}
    assert found["units"]["sites.coded"] == "bits a weight"
    assert found["units"]["totals.dense"] == found["units"]["totals.file"] == "bytes"
    assert "file" not in found["units"], "which is a path here"


def test_what_inspect_says(type_: Callable[..., Ran], timm_file: Path) -> None:
    found = json.loads(type_("inspect", str(timm_file), "--json")[1])
    assert found.keys() - COMMON == keys("`compress MODEL`") - {
        "classes", "missed", "target", "history", "summary", "teacher", "seed"
    } | {"file", "hub", "model", "preprocessing", "recipe"}  # fmt: skip
    assert found["model"]["name"] == MODEL
    (row,) = re.findall(r"^\| `sites` \| (.*) \|$", TEXT, re.MULTILINE)[:1]
    for key in found["sites"][0]:
        assert re.search(rf"\b{key}\b", row), key


@pytest.mark.parametrize("command", ["--dry-run", "pack"])
def test_a_model_has_one_form(type_: Callable[..., Ran], timm_file: Path, command: str, own_folder: Path) -> None:
    del own_folder
    words: dict[str, tuple[str, ...]] = {
        "--dry-run": (MODEL, "--dry-run"),
        "pack": ("pack", MODEL, "--checkpoint-path", str(timm_file), "--num-classes", "10", "--in-chans", "1"),
    }
    code, out, err = type_(*words[command], "--bits", "2", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["model"] == {"name": MODEL, "args": {"num_classes": 10, "in_chans": 1}}
    assert found["recipe"]["stage"][0]["rule"][0]["codewords"] == 4


OTHERS: dict[str, tuple[str, ...]] = {
    "--dry-run": (MODEL, "--dry-run"),
    "eval": ("eval", "own.safetensors", "--dataset", "digits", "--per-class"),
    "verify": ("verify", "own.safetensors"),
    "sweep": ("sweep", MODEL, "--bits", "2,3", "--dry-run"),
    "report": ("report", "own.safetensors"),
    "export": ("export", "own.safetensors", "--to", "reader"),
    "targets": ("targets",),
    "check-data": ("check-data", "images"),
    "schemes": ("schemes",),
    "zoo list": ("zoo", "list"),
    "diff": ("diff", "own.safetensors", "own.safetensors"),
    "env": ("env",),
}
WITHOUT = {
    "sweep": {"folder"}, "--dry-run": {"model", "preprocessing", "recipe"}, "eval": {"model", "preprocessing"},
    "export": {"layers", "total"},
}  # fmt: skip
"""Keys that only a sweep that ran has, or an estimate; and those that are described above, for several commands."""


def described(command: str) -> tuple[set[str], str]:
    """Returns the keys of a document that the page names for a command, and the whole text."""
    (text,) = re.findall(rf"^\| `{command}` \| (.*) \|$", SECTIONS["The others"], re.MULTILINE)
    return set(re.findall(r"`([a-z0-9_]+)`", re.sub(r"\([^()]*\)", "", text))), text


@pytest.mark.parametrize("command", OTHERS)
def test_the_keys_of_every_command(command: str, type_: Callable[..., Ran], timm_file: Path, own_folder: Path) -> None:
    (own_folder / "own.safetensors").write_bytes(timm_file.read_bytes())
    if command == "check-data":
        write_folder(own_folder / "images", {"train": 1, "val": 1})
    code, out, err = type_(*OTHERS[command], "--json")
    assert code == 0, err
    found = json.loads(out)
    keys, text = described(command)
    shared = COMMON | {"file", "hub", "top1"} | WITHOUT.get(command, set())
    packages = set(found["versions"]) | {name for name in found if name in PACKAGES}
    assert found.keys() - shared - packages == keys - shared
    rows = next((value for value in found.values() if isinstance(value, list) and value and type(value[0]) is dict), [])
    for key in {key for row in rows for key in row} if command not in ("zoo list", "check-data") else ():
        assert re.search(rf"\b{key}\b", text), key


def test_every_command_with_a_document_is_on_the_page() -> None:
    with_json = {name for name, one in cli.commands.items() if any("--json" in option.opts for option in one.params)}
    on_page = {name for name in OTHERS if not name.startswith("-")} | {"run", "pack", "inspect", "sensitivity", "push"}
    assert with_json | {"zoo list"} == on_page


def test_units_are_those_of_the_keys() -> None:
    document: dict[str, Any] = {
        "loss": {"dense": 1.0}, "classes": [{"dense": 3}], "sites": [{"sqnr": None, "scheme": "a"}]
    }  # fmt: skip
    assert with_units(document)["units"] == {"loss.dense": "nats", "sites.sqnr": "dB"}
    top1 = {"dense": 0.9, "packed": None, "n": 10, "lost": 1}
    document = {"top1": top1, "totals": {"dense": 4}, "teacher": {"dense": False}, "file": "a.safetensors"}
    assert with_units(document)["units"] == {"top1.dense": "0 to 1", "top1.packed": "0 to 1", "totals.dense": "bytes"}


def test_sizes_and_shares_of_exports_and_sweeps_have_units() -> None:
    export = {"dense": 30, "packed": 10, "exported": 20}
    assert with_units(export)["units"] == dict.fromkeys(export, "bytes")
    row = {"bytes": 10, "dense_bytes": 30, "top1": 0.5, "dense_top1": 0.6, "low": 0.4, "high": 0.6}
    units = with_units({"rows": [row]})["units"]
    assert units == {f"rows.{key}": "bytes" if key.endswith("bytes") else "0 to 1" for key in row}
    assert with_units({"top1": {"packed": 0.5}, "classes": [{"packed": 3}]})["units"] == {"top1.packed": "0 to 1"}
