"""A program of PyTorch: it runs where neither this package nor timm is, and keeps indices packed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import compressor
from compressor import Compressor, Policy, Rule
from tests.helpers.file_commands import timm_file

__all__ = ["timm_file"]  # the fixture

ALONE = """
import sys

import numpy as np

sys.modules["timm"] = sys.modules["compressor"] = None  # any import of them fails
import torch

network = torch.export.load("net.pt2").module()
for count in (1, 5):
    np.save(f"{count}.npy", network(torch.from_numpy(np.load("images.npy")[:count])).numpy())
"""


@pytest.mark.slow
def test_it_runs_without_us_and_without_timm(timm_file: Path, tmp_path: Path) -> None:
    compressor.export(timm_file, "torch", tmp_path / "net.pt2")
    model = compressor.load(timm_file)
    images = torch.randn(5, 1, 160, 160, generator=torch.Generator().manual_seed(1))
    np.save(tmp_path / "images.npy", images.numpy())
    subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, check=True)
    with torch.no_grad():
        for count in (1, 5):
            assert torch.equal(torch.from_numpy(np.load(tmp_path / f"{count}.npy")), model(images[:count]))


def test_generated_indices_are_kept_packed(tmp_path: Path) -> None:
    """64 values and their negatives are 7 bits an index, a quarter of a float."""
    torch.manual_seed(0)
    module, packed = nn.Sequential(nn.Linear(256, 256)), tmp_path / "hashed.safetensors"
    policy = Policy([Rule("*", scheme="hashed", compression=1024)])
    Compressor(module, policy, teacher=None, from_scratch=True).prepare().finish().save(packed)
    done = compressor.export(packed, "torch", tmp_path / "net.pt2", model=module, inputs=torch.randn(2, 256))
    assert done.difference == 0
    assert done.packed < 2_000
    assert done.exported < done.dense / 2
