"""The model card: its metadata are what the hub's index reads, its figures those of the file, and no text is markup."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from compressor.formats.file.reader import PackedFile
from compressor.formats.file.writer import pack
from compressor.model_zoo import checkpoint, packed_path
from compressor.publishing.files import repository_files
from tests.helpers.file_commands import small

pytest.importorskip("matplotlib", reason="needs the extra hub")

ZOO = "test_resnet-tiny"
NASTY = "a|<img src=x>`](x) *_\u202e"


def metadata_of(text: str) -> dict[str, Any]:
    found: dict[str, Any] = ModelCard(text).data.to_dict()  # type: ignore[no-untyped-call]
    return found


def card_of(file: PackedFile, base_model: str | None = None) -> str:
    return repository_files(file, "me/small", base_model)["README.md"].decode()


def test_metadata_are_those_of_the_hub() -> None:
    entry = checkpoint(ZOO)
    with PackedFile.open(packed_path(f"zoo:{ZOO}")) as file:
        data = metadata_of(card_of(file, "timm/test_resnet.r160_in1k"))
    assert (data["library_name"], data["pipeline_tag"]) == ("timm-compressor", "image-classification")
    assert {"timm", "weight-sharing"} <= {*data["tags"]}
    assert data["datasets"] == ["fashion-mnist"]
    assert (data["base_model"], data["base_model_relation"]) == ("timm/test_resnet.r160_in1k", "quantized")
    (model,) = data["model-index"]
    (result,) = model["results"]
    assert (model["name"], result["dataset"]) == (
        "small",
        {"type": "fashion-mnist", "name": "fashion-mnist", "split": "test"},
    )
    (metric,) = result["metrics"]
    assert (metric["type"], metric["value"], metric["args"]["n"]) == ("accuracy", entry.top1, entry.n)
    assert [metric["args"][end] for end in ("low", "high")] == pytest.approx(entry.interval, abs=1e-4)


def test_the_page_has_the_figures_and_the_commands() -> None:
    entry, path = checkpoint(ZOO), packed_path(f"zoo:{ZOO}")
    with PackedFile.open(path) as file:
        text = card_of(file)
    assert f"| this file, bytes | {entry.bytes:,} |" in text
    assert f"| parameters | {entry.parameters:,} |" in text
    assert f"| top-1 of the dense weights | {100 * entry.dense_top1:.2f} % |" in text
    assert f"| top-1 of this file | {100 * entry.top1:.2f} % |" in text
    assert f"compress verify hf-hub:me/small --sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}\n" in text
    assert 'model = compressor.load("hf-hub:me/small")\n' in text
    assert "\ncompress test_resnet --dataset fashion-mnist --recipe hf-hub:me/small --seed 0\n" in text
    assert "![Bytes of the file by tensor and part](bytes.png)" in text
    assert "base_model" not in text
    table = text[text.index("| tensor") :].split("\n\n")[0].splitlines()[2:]
    assert f"All {len([line for line in table if line.startswith('| ')])} shared tensors" in text


def test_what_a_file_does_not_say_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "small"
    path.write_bytes(pack(small()))
    with PackedFile.open(path) as file:
        files = repository_files(file, "me/small", None)
    assert [*files] == ["packed.safetensors", "bytes.png", "README.md"]
    text = files["README.md"].decode()
    assert 'compressor.load("hf-hub:me/small", model=YOUR_MODULE)' in text
    assert "top-1" not in text
    assert "datasets" not in text
    assert "--recipe" not in text
    assert metadata_of(text).keys() >= {"library_name", "tags"}


def test_no_text_of_a_file_is_markup(tmp_path: Path) -> None:
    content = small(
        untouched={},
        aliases={},
        provenance={
            "data": {"name": NASTY, "version": "", "split": "<b>", "n": 10},
            "top1": {"packed": 0.5},
            "versions": {"<i>": "```\n# head"},
        },
    )
    content = replace(content, sites={f"a|<img/src=x>`](x)*_{name}": site for name, site in content.sites.items()})
    path = tmp_path / "nasty"
    path.write_bytes(pack(content))
    with PackedFile.open(path) as file:
        text = card_of(file)
    data = metadata_of(text)
    shown = NASTY.replace("\u202e", "\\x202e")
    assert data["datasets"] == [shown]
    page = text.split("\n---\n", 1)[1]
    assert not re.search(r"<(img|b|i)\b", page)
    assert "&lt;img src=x&gt;" in page
    assert "&lt;img/src=x&gt;" in page
    assert "\u202e" not in page
    assert "\n# head" not in page
    (row,) = [line for line in page.splitlines() if line.startswith("| a") and "one.weight" in line]
    heads = next(line for line in page.splitlines() if line.startswith("| tensor"))
    assert len(re.findall(r"(?<!\\)\|", row)) == heads.count("|")
