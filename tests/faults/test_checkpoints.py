"""Checkpoints that are damaged, or more than tensors: one line, and nothing in them is run."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.faults.test_damaged_files import Says, says
from tests.faults.test_odd_weights import MODEL, SHARE

__all__ = ["says"]  # the fixtures


class Hostile:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, ("executed",)


CHECKPOINTS: dict[str, tuple[Callable[[], object], int, str]] = {
    "hostile": (lambda: {"fc.weight": Hostile()}, 3, "it holds more than tensors: posix.mkdir"),
    "optimiser": (lambda: {"optimizer": {"state": {}, "param_groups": []}, "epoch": 3}, 4, "conv1.0.weight is missing"),
    "options": (lambda: {"epoch": argparse.Namespace(lr=1)}, 4, "conv1.0.weight is missing"),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints_are_never_unpickled(says: Says, kind: str) -> None:
    make, code, text = CHECKPOINTS[kind]
    torch.save(make(), "other.pth")
    assert text in says(code, "pack", MODEL, "--checkpoint-path", "other.pth", *SHARE)
    assert text in says(code, MODEL, "--dry-run", "--checkpoint-path", "other.pth", *SHARE)
    assert not Path("executed").exists()


@pytest.mark.parametrize("name", ["cut.safetensors", "cut.pth", "empty.safetensors", "empty.pth"])
def test_damaged_checkpoints(says: Says, name: str) -> None:
    save_file({"fc.weight": torch.zeros(9)}, "cut.safetensors")
    torch.save({"fc.weight": torch.zeros(9)}, "cut.pth")
    for path in (Path("cut.safetensors"), Path("cut.pth")):
        path.write_bytes(path.read_bytes()[:-9])
        path.with_stem("empty").touch()
    text = f"error: --checkpoint-path {name}: damaged, or no checkpoint ("
    assert says(3, "pack", MODEL, "--checkpoint-path", name, *SHARE).startswith(text)
    assert says(3, MODEL, "--dry-run", "--checkpoint-path", name, *SHARE).startswith(text)
