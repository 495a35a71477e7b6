"""What the weights of one layer make up for in each other, under every scheme."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import compressor
from compressor import Compressor, Policy, Rule
from tests.lifecycle.test_fitting import weight

SETTINGS: dict[str, dict[str, Any]] = {
    "kmeans": {"scheme": "kmeans", "codewords": 6},
    "learnt": {"scheme": "learnt", "codewords": 6},
    "learnt by channel": {"scheme": "learnt", "codewords": 4, "group": "channel"},
    "learnt with a price": {"scheme": "learnt", "rate": 3e-2},
    "kmeans by group": {"scheme": "kmeans", "codewords": 6, "group_size": 3},
    "kmeans with factors": {"scheme": "kmeans", "codewords": 6, "channel_scale": True},
    "kmeans of vectors": {"scheme": "kmeans", "codewords": 24, "vector": 2},
    "learnt by group": {"scheme": "learnt", "codewords": 6, "group_size": 3},
    "learnt with factors": {"scheme": "learnt", "codewords": 6, "channel_scale": True},
    "learnt of vectors": {"scheme": "learnt", "codewords": 24, "vector": 3},
    "uniform": {"scheme": "uniform", "bits": 3},
    "uniform in buckets": {"scheme": "uniform", "bits": 3, "bucket": 32},
    "inq": {"scheme": "inq", "bits": 4},
    "fixed": {"scheme": "fixed", "bits": 4},
    "wfn": {"scheme": "wfn", "delta": 0.1},
}


@pytest.mark.parametrize(
    ("name", "sparsity"),
    [
        (name, sparsity)
        for name in SETTINGS
        for sparsity in (0.0, 0.3)
        if not sparsity or "vector" not in SETTINGS[name]
    ],
)
def test_weights_make_up_for_each_others_errors(name: str, sparsity: float, tmp_path: Path) -> None:
    """Of one layer with inputs that depend on each other, the loss is half the squared error of its outputs."""
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 4, generator=random) @ torch.randn(4, 48, generator=random)
    inputs += 0.3 * torch.randn(400, 48, generator=random)
    layer = nn.Linear(48, 20, bias=False)
    layer.weight.data = 0.1 * torch.randn(20, 48, generator=random)
    dense = layer.weight.detach().clone()
    rule: dict[str, Any] = {**SETTINGS[name], **({"sparsity": sparsity} if sparsity else {})}
    losses, weights = [], []
    for calibration in (inputs, None):
        job = Compressor(layer, Policy([Rule("*", **rule)]), teacher=None).prepare(calibration)
        prepared = weight(job).clone()
        packed = job.finish()
        if name not in ("inq", "wfn"):  # which share weights in the training
            assert torch.equal(prepared, weight(job))
        losses.append(float(((weight(job) - dense) @ inputs.T).square().sum()))
        weights.append(weight(job))
        path = tmp_path / f"{len(losses)}.safetensors"
        packed.save(path)
        loaded = compressor.load(path, model=nn.Linear(48, 20, bias=False))
        assert torch.equal(loaded.get_parameter("weight"), weight(job))
        if sparsity:
            assert int((weight(job) == 0).sum()) >= round(sparsity * 960)
    if name != "learnt with a price":  # whose step depends on the curvature
        assert losses[0] < 0.6 * losses[1]
    if name == "uniform in buckets" and not sparsity:  # the file's scale and offset are the extremes of each bucket
        for end in (0, 1):
            extremes = [torch.aminmax(one.view(30, 32), dim=1)[end] for one in (weights[0], dense)]
            torch.testing.assert_close(*extremes)


@pytest.mark.parametrize(
    "rule", [{"scheme": "wfn", "delta": 0.1}, {"scheme": "learnt", "codewords": 6, "group": "network"}]
)
def test_layers_that_share_a_codebook_make_up_for_errors_too(rule: dict[str, Any]) -> None:
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 4, generator=random) @ torch.randn(4, 48, generator=random)
    model = nn.Sequential(nn.Linear(48, 20, bias=False), nn.ReLU(), nn.Linear(20, 20, bias=False))
    for parameter in model.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=random)
    with torch.no_grad():
        dense = model(inputs)
        losses = []
        for calibration in (inputs, None):
            job = Compressor(model, Policy([Rule("*", **rule)]), teacher=None).prepare(calibration)
            job.finish()
            losses.append(float((job.model(inputs) - dense).square().sum()))
    assert losses[0] < 0.5 * losses[1]
