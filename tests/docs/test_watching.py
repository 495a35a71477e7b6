"""docs/watching.md: its Python runs, and says what it did; its options exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from compressor.cli.main import cli

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "watching.md").read_text(encoding="utf-8")


def test_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    (block,) = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    exec(compile(block, "watching.md", "exec"), names)
    job, packed = names["job"], names["packed"]
    said = capsys.readouterr()
    assert said.err == "", "progress=False"
    (row,) = job.history
    assert f"{row['loss']:.4g}" in said.out
    assert 0 < row["top1"] <= 1
    assert f" {100 * row['top1']:.1f} %" in repr(job.history)
    assert (row["epoch"], row["epochs"], row["fixed"]) == (1, 1, 1.0)
    accuracy = packed.report().provenance.top1.packed
    assert f"top-1 on 360 test images of digits  packed file {100 * accuracy:.1f} %" in said.out
    assert len(job.history._repr_html_().split("<tr>")) == 3
    weights = sum(plan.site.tensor.numel() for plan in job.plans if plan.scheme)
    assert (
        repr(job)
        == f"<Compressor: 16 tensors with {weights:,} weights by kmeans codewords=16; finished after 17 steps>"
    )
    assert repr(packed).startswith(f"<Packed: test_resnet, 16 shared tensors with {weights:,} weights")
    assert packed._repr_html_() == packed.report()._repr_html_()
    assert job._repr_html_().count("<tr>") == 1 + len(job.plans)


def test_options_exist() -> None:
    known = {option for parameter in cli.commands["run"].params for option in parameter.opts}
    named = set(re.findall(r"(?<!\S)`?(--[a-z-]+)", TEXT))
    assert named
    assert named <= known
