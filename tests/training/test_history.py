"""What ``finetune`` keeps and shows of its epochs."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from compressor import Compressor, Policy, Rule
from compressor.training.loop import Epoch


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def loader() -> DataLoader[Any]:
    torch.manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(12, 8), torch.arange(12) % 3), 4)


def job_of() -> Compressor:
    torch.manual_seed(0)
    return Compressor(
        nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 3)), Policy([Rule("*", "kmeans", bits=1)])
    ).prepare()


def test_the_history_is_what_on_epoch_is_told() -> None:
    told: list[tuple[Epoch, float | None]] = []
    job = job_of()
    assert repr(job.history) == "<History of no epochs>"
    job.finetune(loader(), loader(), epochs=2, on_epoch=lambda *both: told.append(both))
    job.finetune(loader(), epochs=1)
    first, second, third = job.history
    assert [(row["epoch"], row["epochs"]) for row in job.history] == [(1, 2), (2, 2), (1, 1)]
    for row, (epoch, top1) in zip((first, second), told, strict=True):
        assert epoch.sharing is not None
        assert (row["loss"], row["lr"], row["top1"], row["bits"]) == (epoch.loss, epoch.lr, top1, epoch.sharing.bits)
    assert third["top1"] is None
    assert job.history[1:] == [second, third]
    assert len(str(job.history).splitlines()) == 4


@pytest.mark.parametrize(
    ("terminal", "settings", "is_shown"),
    [
        (True, {}, True),
        (True, {"progress": False}, False),
        (True, {"on_step": lambda *_: None}, False),
        (True, {"on_step": lambda *_: None, "progress": True}, True),
        (False, {}, False),
        (False, {"progress": True}, True),
    ],
)
def test_a_bar_is_shown_on_a_terminal_unless_unwanted(
    terminal: bool, settings: dict[str, Any], is_shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    job = job_of()
    job.finetune(loader(), loader(), epochs=2, **settings)
    if not is_shown:
        assert not shown.getvalue()
        return
    assert "fine-tuning" in shown.getvalue()
    lines = [line.strip() for line in shown.getvalue().replace("\r", "\n").splitlines()]
    for row in job.history:
        text = f"epoch {row['epoch']} of 2  loss {row['loss']:.3f}  validation {100 * row['top1']:.1f} %"
        assert any(line.startswith(text) for line in lines)


def test_a_job_describes_itself() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 3), nn.Linear(3, 3))
    policy = Policy([Rule("1", bits=2), Rule.ignore("2"), Rule("*", scheme="kmeans", bits=1)])
    job = Compressor(model, policy, teacher=None)
    shared = "2 tensors with 176 weights by kmeans codewords=2 of 1, kmeans codewords=4 of 1, 1 left alone"
    assert repr(job) == f"<Compressor: {shared}; new>"
    assert repr(job.prepare()) == f"<Compressor: {shared}; prepared>"
    job.finetune(loader(), epochs=1, lr=0.0)
    assert repr(job) == f"<Compressor: {shared}; 3 of 3 steps>"
    page = job._repr_html_()
    assert page.count("<tr>") == 1 + 3
    assert "ignored by rule 2 (2)" in page
    packed = job.finish()
    assert repr(packed) == "<Packed: a module, 2 shared tensors with 176 weights>"
    size = len(packed.to_bytes())
    assert repr(packed) == f"<Packed: a module, 2 shared tensors with 176 weights, {size} bytes>"
