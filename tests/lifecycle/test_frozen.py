"""What the caller has frozen: weights without gradient, and modules in eval mode of a model in training mode."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from compressor import Compressor, Policy, Rule
from compressor.formats.errors import UsageError
from compressor.training.evaluation import evaluate

SCHEMES: dict[str, dict[str, Any]] = {
    "learnt": {"bits": 2},
    "kmeans": {"bits": 2},
    "wfn": {},
    "inq": {"bits": 4},
    "ttq": {},
    "fixed": {"bits": 4, "rounding": "stochastic"},
    "uniform": {"bits": 2},
    "diffquant": {"bits": 2},
    "hashed": {"bits": 4},
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    norms = [nn.BatchNorm1d(16) for _ in range(2)]
    return nn.Sequential(nn.Linear(16, 16), norms[0], nn.ReLU(), nn.Linear(16, 16), norms[1], nn.Linear(16, 4))


def batches() -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    inputs = 3 + torch.randn(32, 16, generator=generator)
    return DataLoader(TensorDataset(inputs, torch.randint(4, (32,), generator=generator)), 8)


def policy(scheme: str, **settings: Any) -> Policy:
    return Policy([Rule("*", scheme=scheme, **SCHEMES[scheme], **settings)])


def layer(job: Compressor, number: int) -> Any:
    return job.model.get_submodule(str(number))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_frozen_weight_keeps_the_values_that_it_had_before_training(scheme: str) -> None:
    model = network()
    model[0].requires_grad_(False)
    untrained = Compressor(model, policy(scheme), teacher=None).prepare()
    untrained.finish()
    job = Compressor(model, policy(scheme), teacher=None).prepare()
    job.finetune(batches(), epochs=2, lr=0.05)
    during = layer(job, 0).weight.detach().clone()
    job.finish()
    assert torch.equal(during, layer(untrained, 0).weight)
    assert torch.equal(layer(job, 0).weight, layer(untrained, 0).weight)
    assert torch.equal(layer(job, 0).bias, model.get_parameter("0.bias"))
    assert len(layer(job, 0).weight.unique()) < 256
    assert not torch.equal(layer(job, 3).weight, layer(untrained, 3).weight)
    assert not layer(job, 0).weight.requires_grad


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_frozen_model_is_packed_like_another(scheme: str) -> None:
    files = []
    for frozen in (False, True):
        model = network().requires_grad_(not frozen)
        torch.manual_seed(0)
        files.append(Compressor(model, policy(scheme), teacher=None).prepare().finish().to_bytes())
    assert files[0] == files[1]


def test_a_frozen_model_has_importance_and_nothing_to_train() -> None:
    job = Compressor(network().requires_grad_(False), policy("learnt"), teacher=None)
    job.prepare(calibration=batches())
    assert not any(parameter.requires_grad for parameter in job.model.parameters())
    with pytest.raises(UsageError, match="nothing to train, all parameters are frozen"):
        job.finetune(batches(), epochs=1)
    plain = Compressor(network(), policy("learnt"), teacher=None).prepare(calibration=batches())
    assert torch.equal(job.groups[0].codebook(), plain.groups[0].codebook())


def test_weights_frozen_after_prepare_are_not_trained() -> None:
    job = Compressor(network(), policy("learnt"), teacher=None).prepare()
    layer(job, 0).requires_grad_(False)
    before = layer(job, 0).weight.detach().clone()
    job.finetune(batches(), epochs=2, lr=0.05)
    assert torch.equal(layer(job, 0).weight, before)


def test_frozen_weights_are_pruned_at_once() -> None:
    model = network()
    model[0].requires_grad_(False)
    job = Compressor(model, policy("kmeans", sparsity=0.5, sparsity_by=1.0), teacher=None).prepare()
    assert int((layer(job, 0).weight == 0).sum()) == 128
    assert int((layer(job, 3).weight == 0).sum()) == 0


def statistics(norm: Any) -> list[Tensor]:
    return [norm.running_mean.clone(), norm.running_var.clone(), norm.num_batches_tracked.clone()]


@pytest.mark.parametrize("val", [None, batches()])
def test_a_norm_in_eval_mode_keeps_its_statistics(val: Any) -> None:
    model = network()
    model[1].eval()
    job = Compressor(model, policy("learnt"), teacher=None).prepare()
    assert job.model.training
    assert not layer(job, 1).training
    job.finetune(batches(), val, epochs=2)
    evaluate(job.model, batches())
    assert [layer(job, number).training for number in range(6)] == [True, False, True, True, True, True]
    assert [float(one.sum()) for one in statistics(layer(job, 1))] == [0.0, 16.0, 0.0]
    assert int(layer(job, 4).num_batches_tracked) == 8
    job.finetune(batches(), epochs=1)
    job.model.eval()  # the statistics stay, however the model is left
    job.finish(calibration=batches())
    assert [float(one.sum()) for one in statistics(layer(job, 1))] == [0.0, 16.0, 0.0]
    assert int(layer(job, 4).num_batches_tracked) == 4
    assert not layer(job, 4).training


def test_a_model_in_eval_mode_is_trained_as_a_whole() -> None:
    job = Compressor(network().eval(), policy("learnt"), teacher=None).prepare()
    job.finetune(batches(), epochs=1)
    assert all(module.training for module in job.model.modules())
    assert int(layer(job, 1).num_batches_tracked) == 4


def test_estimated_statistics_are_those_of_torch() -> None:
    job = Compressor(network(), policy("learnt"), teacher=None).prepare()
    job.finish()
    twin: Any = copy.deepcopy(job.model)
    again = Compressor(job.model, Policy([Rule("*", scheme="kmeans", bits=2)]), teacher=None, copy=False).prepare()
    again.finish(calibration=batches())
    torch.optim.swa_utils.update_bn(batches(), twin)
    for norm, theirs in ((layer(again, 1), twin[1]), (layer(again, 4), twin[4])):
        assert all(torch.equal(a, b) for a, b in zip(statistics(norm), statistics(theirs), strict=True))
