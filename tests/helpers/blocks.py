"""Weights whose indices are hashed, and a watch that they never exist whole, for the tests of virtual weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor import Compressor, Policy, Rule
from compressor.formats.codecs.base import Stream
from compressor.formats.codecs.registry import codec_class
from compressor.formats.inference import blockwise, generated
from compressor.formats.inference.generated import Generated

CODEC = codec_class("hashed")()


@pytest.fixture
def never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 weights, and no more than a channel, must do."""

    def refuse(self: Generated, codebook: Tensor) -> Tensor:
        raise AssertionError(f"{self.stream.name} was expanded")

    rows = Generated.rows

    def few(self: Generated, codebook: Tensor, part: range) -> tuple[Tensor, Tensor]:
        assert len(part) * self.channel <= max(64, self.channel)
        return rows(self, codebook, part)

    blocks_of(64, monkeypatch)
    monkeypatch.setattr(Generated, "expand", refuse)
    monkeypatch.setattr(Generated, "rows", few)


def blocks_of(weights: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "BLOCK", weights)
    monkeypatch.setattr(generated, "BLOCK", weights)


def source_of(shape: tuple[int, ...], codewords: int = 10, dtype: torch.dtype = torch.float64) -> Generated:
    count = torch.Size(shape).numel()
    return Generated(CODEC, Stream("fc.weight", count, codewords), shape, dtype)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=4),
        nn.Flatten(), nn.Linear(12 * 4 * 4, 40), nn.ReLU(), nn.Linear(40, 5),
    )  # fmt: skip


def job_of(model: nn.Module, virtual: bool, **options: Any) -> Compressor:
    policy = Policy([Rule("*", scheme="hashed", compression=8)])
    job = Compressor(model, policy, copy=False, teacher=None, from_scratch=True, **options)
    return job.prepare(virtual=virtual)
