"""How far the sharing has come: bits a weight as the file will have them, and indices that change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from compressor import SCHEMES, Compressor, Policy, Rule
from compressor.sharing.code_length import CodeLength
from compressor.training.loop import Epoch
from compressor.training.metrics import SharingMetrics, SharingMonitor

PRUNED = [{}, {"sparsity": 0.5}]


def job_of(scheme: str, **settings: Any) -> Compressor:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5))
    return Compressor(net, Policy([Rule("*", scheme=scheme, **settings)]), seed=1).prepare()


def loader() -> DataLoader[Any]:
    random = torch.Generator().manual_seed(3)
    data = TensorDataset(torch.randn(24, 40, generator=random), torch.randint(5, (24,), generator=random))
    return DataLoader(data, 4, shuffle=True, generator=random)


@pytest.mark.parametrize("settings", PRUNED, ids=["", "pruned"])
@pytest.mark.parametrize("scheme", sorted(name for name, kind in SCHEMES.items() if kind.shares))
def test_the_bits_are_those_of_the_file(scheme: str, settings: dict[str, Any]) -> None:
    """When training ends, what was shown is what the report computes from the file."""
    job = job_of(scheme, **settings).finetune(loader(), epochs=1, lr=0.01)
    with torch.no_grad():
        for group in job.groups:
            group.on_step(1.0)
    sharing = SharingMonitor(job.groups).measure()
    assert sharing is not None
    assert sharing.fixed == 1
    assert sharing.changed is None
    generated = any(group.scheme.generator() and not group.has_zeros for group in job.groups)
    rows = job.finish().report().rows
    indices = 0.0 if generated else sum(row.entropy * row.weights for row in rows)
    values = 8 * sum(row.codebook for row in rows)
    assert sharing.bits * sum(row.weights for row in rows) == pytest.approx(indices + values, rel=1e-6)


@pytest.mark.parametrize("settings", PRUNED, ids=["", "pruned"])
@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_looking_changes_nothing(scheme: str, settings: dict[str, Any]) -> None:
    seen: list[Epoch] = []
    alone, watched = (job_of(scheme, **settings) for _ in range(2))
    alone.finetune(loader(), epochs=3, lr=0.01)
    watched.finetune(loader(), epochs=3, lr=0.01, on_epoch=lambda epoch, _: seen.append(epoch))
    assert watched.finish().to_bytes() == alone.finish().to_bytes()
    assert [epoch.sharing is None for epoch in seen] == [not SCHEMES[scheme].shares] * 3
    assert seen[0].lr > seen[1].lr > seen[2].lr >= 0


def test_indices_that_change() -> None:
    """Two of eight weights go over to the other value; that the values themselves move is no change."""
    job = Compressor(nn.Linear(8, 1), Policy([Rule("*", scheme="learnt", codewords=2)]), copy=False)
    with torch.no_grad():
        job.model.weight.copy_(torch.tensor([[-1.0, -1, -1, -1, 1, 1, 1, 1]]))  # type: ignore[operator]
    (group,) = job.prepare().groups
    (site,) = group.sites
    watch = SharingMonitor([group])
    assert watch.measure() == SharingMetrics(bits=1 + 2 * 32 / 8, fixed=1.0, changed=None)
    with torch.no_grad():
        group.values.mul_(1.5)
        group.master_weight(site)[0, 3:5] *= -1
    assert watch.measure() == SharingMetrics(bits=1 + 2 * 32 / 8, fixed=1.0, changed=0.25)
    with torch.no_grad():
        group.master_weight(site)[0, 3] *= -1
    assert watch.measure().changed == 0.125  # type: ignore[union-attr]


def test_indices_stay_where_a_grid_loses_its_first_codeword() -> None:
    layer = nn.Linear(64, 8, bias=False)
    job = Compressor(layer, Policy([Rule("*", scheme="learnt", rate=1e-3)])).prepare(calibration=None)
    (group,) = job.groups
    weights, step = group.master_weight(group.sites[0]), CodeLength(group).grid[1]
    with torch.no_grad():
        weights.copy_(torch.arange(512).remainder(3).sub(1).view(8, 64) * step)
        weights[0, 0] = -2 * step
        watch = SharingMonitor([group])
        watch.measure()
        weights[0, 0] = -step
    assert watch.measure().changed == 1 / 512  # type: ignore[union-attr]


def test_free_weights_count_for_nothing() -> None:
    """In rounds, those that are fixed have an index; of the others nothing is said but how many they are."""
    job = job_of("inq", bits=5)
    job.attach(torch.optim.SGD(job.param_groups(lr=0.1)), total_steps=4)
    sharing = SharingMonitor(job.groups).measure()
    assert sharing is not None
    fixed = [bool(found >= 0) for group in job.groups for s in group.sites for found in group.indices(s).flatten()]
    assert sharing.fixed == sum(fixed) / len(fixed) == pytest.approx(0.5, abs=0.01)
    assert 1 < sharing.bits < 8
