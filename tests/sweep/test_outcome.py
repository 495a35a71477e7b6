"""The reader of what a run prints as JSON."""

from __future__ import annotations

from typing import Any

import pytest

from compressor.sweep.outcome import Outcome

DOCUMENT: dict[str, Any] = {
    "schema_version": 1,
    "file": "a.safetensors",
    "model": {"name": "tiny", "args": {}},
    "top1": {"packed": 0.75, "n": 32, "low": 0.58, "high": 0.87, "dense": 0.8, "lost": 2, "gained": 1},
    "missed": ["top-1 is 75.00 %"],
    "target": {"rate": 1e-7, "predicted": 990},
    "seed": 3,
    "summary": "a.summary.csv",
    "totals": {"file": 1000, "dense": 8000, "parameters": 2000},
}


def test_figures_are_those_of_the_document() -> None:
    assert Outcome.of(DOCUMENT) == Outcome(
        model="tiny", file="a.safetensors", bytes=1000, dense_bytes=8000, parameters=2000, n=32, top1=0.75,
        dense_top1=0.8, low=0.58, high=0.87, lost=2, gained=1, rate=1e-7, seed=3, summary="a.summary.csv",
        missed=("top-1 is 75.00 %",),
    )  # fmt: skip


def test_a_run_without_data_has_no_accuracy() -> None:
    found = Outcome.of({**DOCUMENT, "top1": None, "target": None, "summary": None, "missed": []})
    assert (found.n, found.top1, found.dense_top1, found.low, found.lost, found.rate) == (
        0,
        None,
        None,
        None,
        None,
        None,
    )
    assert found.bytes == 1000


def test_a_document_without_sizes_is_refused() -> None:
    with pytest.raises(KeyError, match="totals"):
        Outcome.of({key: value for key, value in DOCUMENT.items() if key != "totals"})
