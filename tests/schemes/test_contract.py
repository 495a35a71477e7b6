"""What every scheme must do, from the first day. No scheme is named here: the registry drives the tests."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from compressor.compressor import Compressor
from compressor.formats.file.reader import PackedFile
from compressor.formats.file.writer import pack
from compressor.lifecycle.convert import decode_tensor
from compressor.policy.policy import Policy
from tests.helpers.contract import MODULES, OPTIMIZERS, SHARING, Tied, job_of, rule_of, train

pytestmark = pytest.mark.parametrize("scheme", SHARING)


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_trains_and_packs_exactly_what_it_computed(scheme: str, kind: str, optimizer: str) -> None:
    make, inputs_of = MODULES[kind]
    torch.manual_seed(0)
    model, inputs = make(), inputs_of()
    job = job_of(model, scheme).prepare()
    opt = OPTIMIZERS[optimizer](job.param_groups(lr=0.05))
    job.attach(opt, 3)
    train(job, inputs, opt)
    job.model.eval()
    trained = job.model(inputs)
    packed = job.finish()
    assert torch.equal(job.model(inputs), trained)
    with PackedFile.from_bytes(pack(packed.content)) as file:
        for name in file.sites:
            shared = file.shared(name)
            weights = job.model.state_dict()[name]
            assert torch.equal(decode_tensor(shared, file.books[shared.book]), weights)
            codewords = file.books[shared.book].expand()
            if shared.scale is None and shared.offset is None:
                assert np.isin(weights.numpy(), codewords).all()


@pytest.mark.parametrize("kind", MODULES)
def test_finish_leaves_no_trace(scheme: str, kind: str) -> None:
    model = MODULES[kind][0]()
    before = {n: (type(m), list(m._parameters), dict(m.__dict__).keys()) for n, m in model.named_modules()}
    keys, parameters = list(model.state_dict()), dict(model.named_parameters(remove_duplicate=False))
    job_of(model, scheme, copy=False).prepare().finish()
    assert list(model.state_dict()) == keys
    assert {n: (type(m), list(m._parameters), dict(m.__dict__).keys()) for n, m in model.named_modules()} == before
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert parameter is parameters[name]


@pytest.mark.parametrize("kind", MODULES)
def test_undo_restores(scheme: str, kind: str) -> None:
    make, inputs_of = MODULES[kind]
    model = make()
    dense = copy.deepcopy(model.state_dict())
    job = job_of(model, scheme, copy=False).prepare()
    train(job, inputs_of(), torch.optim.SGD(job.param_groups(lr=0.0), lr=0.0))
    job.undo()
    assert list(model.state_dict()) == list(dense)
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())


def test_the_given_model_is_not_touched(scheme: str) -> None:
    model = nn.Linear(8, 8)
    dense = copy.deepcopy(model.state_dict())
    job_of(model, scheme).prepare().finish()
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())


def test_resumed_training_ends_in_the_same_bytes(scheme: str) -> None:
    def start() -> tuple[Compressor, torch.optim.Optimizer, Tensor]:
        torch.manual_seed(3)
        model, inputs = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(8, 16)
        job = job_of(model, scheme).prepare()
        opt = torch.optim.AdamW(job.param_groups(lr=0.01))
        job.attach(opt, 20)
        return job, opt, inputs

    whole, opt, inputs = start()
    train(whole, inputs, opt, 9)
    job_state, opt_state = copy.deepcopy(whole.state_dict()), copy.deepcopy(opt.state_dict())
    train(whole, inputs, opt, 11)
    resumed, opt, inputs = start()
    resumed.load_state_dict(job_state)
    opt.load_state_dict(opt_state)
    train(resumed, inputs, opt, 11)
    assert resumed.finish().to_bytes() == whole.finish().to_bytes()


def test_tied_tensors_stay_tied_and_are_stored_once(scheme: str) -> None:
    model = Tied()
    job = job_of(model, scheme, copy=False).prepare()
    packed = job.finish()
    assert model.head.weight is model.embed.weight
    assert list(packed.content.sites) == ["embed.weight"]
    assert packed.content.aliases == {"head.weight": "embed.weight"}


def test_deep_copies_stand_alone(scheme: str) -> None:
    """As timm's exponential moving average copies a model in training."""
    torch.manual_seed(0)
    model, inputs = nn.Linear(16, 12), torch.randn(8, 16)
    job = job_of(model, scheme).prepare()
    before = job.model(inputs).detach()
    copied = copy.deepcopy(job.model)
    opt = torch.optim.SGD(job.param_groups(lr=0.5), lr=0.5)
    train(job, inputs, opt, 3)
    assert torch.equal(copied(inputs), before)
    assert not torch.equal(job.model(inputs), before)
    job.finish()
    assert torch.equal(copied(inputs), before)


def test_averages_with_timms_ema(scheme: str) -> None:
    model = nn.Linear(16, 12)
    job = job_of(model, scheme).prepare()
    ema = ModelEmaV3(job.model, decay=0.5)
    opt = torch.optim.SGD(job.param_groups(lr=0.1), lr=0.1)
    train(job, torch.randn(8, 16), opt, 2)
    ema.update(job.model)
    assert torch.isfinite(ema.module(torch.randn(2, 16))).all()


@pytest.mark.parametrize("other", SHARING)
def test_two_schemes_in_one_model_under_one_optimiser(scheme: str, other: str) -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(8, 16)
    policy = Policy([rule_of(scheme, "0"), rule_of(other, "2")])
    job = Compressor(model, policy, teacher=None).prepare()
    opt = torch.optim.AdamW(job.param_groups(lr=0.01))
    job.attach(opt, 3)
    train(job, inputs, opt, 3)
    computed = job.model(inputs)
    packed = job.finish()
    assert torch.equal(job.model(inputs), computed)
    assert set(packed.content.sites) == {"0.weight", "2.weight"}
