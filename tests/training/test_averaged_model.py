"""PyTorch's own ``AveragedModel`` over a model in training: it follows codebooks and indices from round to round."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from compressor import SCHEMES, Compressor, Policy, Rule


@pytest.mark.parametrize("multi_avg_fn", [None, get_ema_multi_avg_fn(0.5)])
@pytest.mark.parametrize("scheme", [name for name, scheme in SCHEMES.items() if scheme.shares])
def test_averages_are_taken_over_all_rounds(scheme: str, multi_avg_fn: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
    job = Compressor(net, Policy([Rule("*", scheme=scheme)]), teacher=None).prepare()
    optimizer = torch.optim.SGD(job.param_groups(lr=0.05))
    average: Any = AveragedModel(job.model, multi_avg_fn=multi_avg_fn)
    job.attach(optimizer, total_steps=10)
    inputs, targets = torch.randn(32, 16), torch.randint(4, (32,))
    for _ in range(10):
        optimizer.zero_grad()
        job.loss(job.model(inputs), targets).backward()
        optimizer.step()
        average.update_parameters(job.model)
    theirs, ours = dict(average.module.named_buffers()), dict(job.model.named_buffers())
    assert list(theirs) == list(ours)
    assert all(torch.equal(theirs[name].nan_to_num(), ours[name].nan_to_num()) for name in ours)
    if scheme in ("wfn", "inq"):  # after the last round every weight is a codeword, whatever the master weights are
        layer: Any = job.model.get_submodule("0")
        assert torch.equal(average.module[0].weight, layer.weight)
    assert torch.isfinite(average(inputs)).all()
    again = Compressor(net, Policy([Rule("*", scheme=scheme)]), teacher=None).prepare()
    again.load_state_dict({"model": average.module.state_dict(), "steps": 10})
    assert torch.equal(again.model.eval()(inputs), average.eval()(inputs))


def test_a_codebook_that_grows_keeps_its_place_and_shape() -> None:
    net = nn.Linear(64, 64)
    job = Compressor(net, Policy([Rule("*", scheme="wfn")]), teacher=None).prepare()
    (group,) = job.groups
    shapes = {name: (buffer.shape, buffer.dtype) for name, buffer in group.named_buffers()}
    counts = []
    for progress in (0.0, 0.5, 1.0):
        group.on_step(progress)
        counts.append(group.codeword_count)
        assert {name: (buffer.shape, buffer.dtype) for name, buffer in group.named_buffers()} == shapes
        assert list(dict(group.named_buffers())) == list(shapes)
        assert len(group.codebook()) == counts[-1] == len(group.codebook().unique())
    assert 1 < counts[0] < counts[1] < counts[2]
    assert shapes["values"] == (torch.Size([4096]), torch.float32)
    assert shapes["indices_0"] == (torch.Size([64, 64]), torch.int16)
