"""docs/scaling.md: its table of memory is what tensors take, and its options exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from compressor import SCHEMES, Compressor, Policy, Rule
from compressor.cli.main import cli

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| ([a-z, ]+) \| ([\d |]+) \|$", PAGE, re.MULTILINE)
TERMS = {name: [int(term) for term in terms.split(" | ")] for names, terms in ROWS for name in names.split(", ")}


def test_the_table_has_every_scheme_that_shares() -> None:
    assert set(TERMS) == {name for name, scheme in SCHEMES.items() if scheme.shares}


@pytest.mark.parametrize("name", TERMS)
def test_bytes_held_per_weight(name: str) -> None:
    *terms, total = TERMS[name]
    assert sum(terms) == total
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512, bias=False))
    job = Compressor(model, Policy([Rule("*", scheme=name)]), copy=False).prepare()
    optimizer = torch.optim.AdamW(job.param_groups(lr=1e-4))
    job.attach(optimizer, total_steps=100)
    for _ in range(2):
        optimizer.zero_grad()
        inputs = torch.randn(4, 512)
        job.loss(job.model(inputs), torch.zeros(4, dtype=torch.int64), inputs=inputs).backward()
        optimizer.step()
    assert job.teacher is not None
    tensors = [*job.model.parameters(), *job.model.buffers(), *job.teacher.parameters(), *job.dense.values()]
    tensors += [tensor.grad for tensor in job.model.parameters() if tensor.grad is not None]
    tensors += [value for state in optimizer.state.values() for value in state.values()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    assert sum(storages.values()) / 512**2 == pytest.approx(total, abs=0.1)


def test_options_exist() -> None:
    known = {option for parameter in cli.commands["run"].params for option in parameter.opts}
    commands = [line.partition("compressor.cli")[2] for line in PAGE.splitlines() if "-m compressor.cli" in line]
    assert len(commands) == 3
    assert {word for line in commands for word in re.findall(r"--[a-z-]+", line)} <= known
