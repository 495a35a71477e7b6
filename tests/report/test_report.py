"""Reports: every figure against the obvious way to get it, every byte accounted for."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from compressor import Compressor, Policy, Rule
from compressor.formats.errors import FormatError
from compressor.formats.file.reader import PackedFile
from compressor.formats.file.writer import pack
from compressor.formats.loader import load_state_dict
from compressor.lifecycle.packed import Packed
from compressor.model_zoo import list_checkpoints, packed_path
from compressor.report.report import Report, dense_size
from tests.helpers.forging import forged_from


@pytest.fixture(scope="module")
def packed() -> tuple[Compressor, Packed]:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    policy = Policy([Rule("fc", bits=6), Rule.ignore("conv1"), Rule("*", scheme="learnt", codewords=3)])
    job = Compressor(model, policy, model_args={"num_classes": 10, "in_chans": 1}).prepare()
    return job, job.finish()


def test_rows_say_what_the_weights_are(packed: tuple[Compressor, Packed]) -> None:
    job, result = packed
    for row in result.report().rows:
        weights = job.model.state_dict()[row.site]
        values, counts = weights.unique(return_counts=True)
        share = counts.double() / weights.numel()
        assert row.shape == tuple(weights.shape)
        assert row.used == len(values)
        assert row.zeros == pytest.approx(float((weights == 0).double().mean()))
        assert row.entropy == pytest.approx(float(-(share * share.log2()).sum()))
        noise = (job.dense[row.site] - weights).double().square().sum()
        signal = job.dense[row.site].double().square().sum()
        assert row.sqnr == pytest.approx(float(10 * (signal / noise).log10()), abs=0.006)
        assert row.coded >= row.entropy - 1e-9
        assert row.rule in ("fc", "*")
        assert row.scheme == "learnt"
        assert row.allowed == (64 if row.site == "fc.weight" else 3)


def test_the_parts_sum_to_the_file(packed: tuple[Compressor, Packed], tmp_path: Path) -> None:
    _, result = packed
    report, t = result.report(), result.report().totals
    size = result.save(tmp_path / "small.safetensors")
    assert t.file == size == t.indices + t.codebooks + t.untouched + t.header + t.checksums
    assert t.indices == sum(row.indices for row in report.rows)
    assert t.codebooks == sum(row.codebook for row in report.rows)
    assert sum(row.overhead for row in report.rows) < t.header + t.checksums


def test_dense_size_is_that_of_the_real_file(packed: tuple[Compressor, Packed]) -> None:
    job, result = packed
    t = result.report().totals
    assert t.dense == len(safetensors.torch.save(job.model.state_dict()))
    assert t.parameters == sum(p.numel() for p in job.model.parameters())
    everything = np.unique(np.concatenate([job.model.state_dict()[row.site].ravel() for row in result.report().rows]))
    assert result.report().weight_space.unique == len(everything)


@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_tables_fit_the_width(packed: tuple[Compressor, Packed], width: int) -> None:
    report = packed[1].report()
    for everything in (False, True):
        text = report.table(width, everything)
        assert max(map(len, text.splitlines())) <= width
        assert all(column in text for column in ("site", "entropy", "coded", "indices", "ratio", "SQNR"))
    assert all(row.site in report.table(width, everything=True) for row in report.rows)
    assert "ignored by rule 2 (conv1)" in report.table(width, everything=True)


def test_the_legend_is_that_of_the_columns_shown(packed: tuple[Compressor, Packed]) -> None:
    report = packed[1].report()
    wide, narrow = report.table(200), report.table(70)
    assert "indices, codebook and overhead in bytes; codewords: shared values" in " ".join(wide.split())
    assert "codewords" not in narrow
    assert "overhead" not in narrow
    assert "indices in bytes" in " ".join(narrow.split())


def test_what_is_left_out_is_asked_for_as_the_reader_can(packed: tuple[Compressor, Packed]) -> None:
    report = packed[1].report()
    hidden = len(report.rows) - 10
    assert hidden > 0
    assert f"({hidden} more: table(everything=True))" in str(report)
    assert f"({hidden} more: --all)" in report.table(120, how="--all")
    assert "--all" not in str(report)


def test_json_and_markdown(packed: tuple[Compressor, Packed]) -> None:
    report = packed[1].report()
    said = json.loads(report.to_json())
    assert said["schema_version"] == 2
    assert [row["site"] for row in said["sites"]] == [row.site for row in report.rows]
    assert report.to_markdown().count("\n|") == len(report.rows) + 1


def test_reading_a_report_imports_no_torch(packed: tuple[Compressor, Packed], tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    packed[1].save(path)
    code = (
        "import sys; from compressor.formats.file.reader import PackedFile; "
        "from compressor.report.report import Report; "
        f"Report.of(PackedFile.open({str(path)!r})).table(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_report_of_a_file_is_that_of_its_maker(packed: tuple[Compressor, Packed], tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    packed[1].save(path)
    with PackedFile.open(path) as file:
        assert str(Report.of(file)) == str(packed[1].report())
        assert Report.of(file).to_json() == packed[1].report().to_json()


LIES: dict[str, dict[str, Any]] = {
    "top1 is a number": {"top1": 5},
    "top1 above one": {"top1": {"packed": 7.0}},
    "sqnr is text": {"sqnr": "much"},
    "negative rule": {"rules": [-1]},
    "left is a list": {"left": ["fc"]},
    "data lacks n": {"data": {"name": "digits", "version": "1", "split": "test"}},
}


@pytest.mark.parametrize("lie", LIES)
def test_provenance_that_lies_is_a_format_error(packed: tuple[Compressor, Packed], lie: str) -> None:
    good = pack(replace(packed[1].content, provenance={"seed": 0}))
    with pytest.raises(FormatError, match="provenance"):
        PackedFile.from_bytes(forged_from(good, lambda fields: fields.update(provenance=LIES[lie])))


def test_text_from_a_file_cannot_drive_the_terminal(packed: tuple[Compressor, Packed]) -> None:
    content = packed[1].content
    forged = replace(
        content,
        provenance={"left": {"fc\x1b]0;": "\x9b1m"}, "rules": [0] * len(content.sites)},
    )
    with PackedFile.from_bytes(pack(forged)) as file:
        report = Report.of(file)
    assert all(line.isprintable() for line in report.table(200, everything=True).splitlines())


def test_a_recipe_that_does_not_fit_is_passed_over(packed: tuple[Compressor, Packed]) -> None:
    forged = replace(packed[1].content, provenance={"rules": [99]}, recipe={"stage": []})
    with PackedFile.from_bytes(pack(forged)) as file:
        assert Report.of(file).rows[0].rule == ""


@pytest.mark.parametrize("name", list_checkpoints())
def test_dense_size_counts_each_tensor_of_a_stack(name: str) -> None:
    path = packed_path(f"zoo:{name}")
    with PackedFile.open(path) as file:
        assert any(" " in entry for entry in (*file.sites, *file.untouched)), "a stack"
        assert dense_size(file) == len(safetensors.torch.save(load_state_dict(path)))


def test_all_that_stays_dense_is_listed_with_its_reason() -> None:
    model = timm.create_model("test_vit", num_classes=10)
    policy = Policy([Rule.ignore("head"), Rule("*", scheme="kmeans", bits=2)])
    report = Compressor(model, policy, teacher=None).prepare().finish().report()
    unnamed = "a norm, position, bias or buffer; shared only by a rule that names it"
    expected = {"head.weight": "ignored by rule 1 (head)", "cls_token": unnamed, "pos_embed": unnamed}
    assert report.left == json.loads(report.to_json())["left"] == expected
    assert f"left alone: pos_embed: {unnamed}" in report.table()
