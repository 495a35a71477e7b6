"""Layers that learn at rates of their own, as timm has it, under every schedule."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay

from compressor import Compressor, Policy, Rule
from compressor.training.optim import make_optimizer


def test_layers_learn_at_rates_of_their_own() -> None:
    """As timm has it: each layer so many times as fast as the one after it; a codebook as its layer."""
    model = timm.create_model("test_resnet", num_classes=10)
    scales = {
        id(parameter): group["lr_scale"]
        for group in param_groups_layer_decay(model, layer_decay=0.5)
        for parameter in group["params"]
    }
    job = Compressor(model, Policy([Rule("*", scheme="learnt", bits=2)]), copy=False, teacher=None).prepare()
    rates = {id(p): group["lr"] for group in job.param_groups(lr=0.4, layer_decay=0.5) for p in group["params"]}
    assert len({*scales.values()}) > 3
    for identity, scale in scales.items():
        assert rates.pop(identity) == pytest.approx(0.4 * scale)
    for group in job.groups:
        assert rates.pop(id(group.values)) == pytest.approx(0.4 * scales[id(group.master_weight(group.sites[0]))])
    assert not rates


@pytest.mark.parametrize("sched", ["cosine", "step", "none"])
def test_schedules_keep_the_layers_rates_apart(sched: str) -> None:
    job = Compressor(timm.create_model("test_vit", num_classes=10), Policy([Rule("*", "learnt", bits=2)])).prepare()
    optimizer, schedule = make_optimizer(job.param_groups(0.4, layer_decay=0.5), "sgd", 0.4, sched, 2, 3)
    for _ in range(4):
        schedule.step()
        rates = sorted({group["lr"] for group in optimizer.param_groups})
        assert [low / high for low, high in pairwise(rates)] == pytest.approx([0.5] * (len(rates) - 1))
        assert len(rates) > 3


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_tensors_on_grids_learn_in_proportion_to_their_steps(decay: float) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=10)
    policy = Policy([Rule("blocks.0.*", "learnt", rate=1e-6), Rule("head", "learnt", rate=1e-6)])
    job = Compressor(model, policy, copy=False).prepare(calibration=torch.randn(16, 3, 160, 160))
    steps = {id(group.trained()[0]): float(group.codebook().diff().mean()) for group in job.groups}
    assert max(steps.values()) > 2 * min(steps.values())
    mean = math.prod(steps.values()) ** (1 / len(steps))
    scales = {
        id(parameter): group["lr_scale"]
        for group in param_groups_layer_decay(model, layer_decay=decay)
        for parameter in group["params"]
    }
    for group in job.param_groups(lr=0.4, layer_decay=decay):
        for parameter in group["params"]:
            expected = 0.4 * 3 * steps.get(id(parameter), mean / 3) / mean * scales[id(parameter)]
            assert group["lr"] == pytest.approx(expected, rel=1e-4)
