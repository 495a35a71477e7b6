"""The memory of packing with curvature: a few copies of the network, and of the moments of its widest layer."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PACKED = """
import sys, torch
from pathlib import Path
from torch import nn
from compressor import Compressor

torch.set_num_threads(1)
torch.manual_seed(0)

def status(field):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024

def packed(inside, depth):
    layers = [nn.Linear(8, inside), *(nn.Linear(inside, inside) for _ in range(depth)), nn.Linear(inside, 10)]
    model = nn.Sequential(*layers).eval()
    images = torch.randn(256, 8)
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    before = status("VmRSS")
    job = Compressor(model, rate=1e-6, teacher=None, original=model.state_dict())
    len(job.prepare(images).finish().to_bytes())
    return status("VmHWM") - before

packed(32, 1)  # what is loaded late is loaded now
print(packed(*map(int, sys.argv[1:])))
"""
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.parametrize(
    ("inside", "depth", "networks", "matrices"), [(2560, 0, 3, 2.5), (700, 16, 3, 3)], ids=["wide", "deep"]
)
def test_packing_takes_few_copies(inside: int, depth: int, networks: float, matrices: float) -> None:
    command = [sys.executable, "-c", PACKED, str(inside), str(depth)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | GIVE_BACK)
    assert done.returncode == 0, done.stderr
    network, matrix = 4 * (depth * inside**2 + 18 * inside), 4 * inside**2
    assert int(done.stdout) < 1.05 * (networks * network + matrices * matrix)
