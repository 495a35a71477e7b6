"""Incremental network quantisation's rounds: what is frozen when, and that it stays so."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor.compressor import Compressor
from compressor.formats.errors import PolicyError
from compressor.policy.policy import Policy, Rule
from compressor.schemes.inq import INQ
from compressor.sharing.group import Group
from compressor.sharing.registry import make_scheme
from tests.helpers.groups import fitted

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01, weight_decay=0.1),
}

PAPER = {  # as printed
    5: (0.5, 0.75, 0.875, 1),
    4: (0.3, 0.5, 0.8, 0.9, 0.95, 1),
    3: (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 1),
    2: (0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.975, 1),
}


def group_of(weights: Tensor, scheme: INQ) -> Group:
    return fitted(scheme, weights)


def weight_of(group: Group) -> Tensor:
    site = group.sites[0]
    return group.weight(site, group.master_weight(site)).detach().reshape(-1).clone()


def job_of(bits: int = 5, **settings: Any) -> Compressor:
    torch.manual_seed(0)
    return Compressor(
        nn.Linear(25, 15), Policy([Rule("*", scheme="inq", bits=bits, **settings)]), teacher=None
    ).prepare()


def step(job: Compressor, optimizer: torch.optim.Optimizer, seed: int) -> None:
    inputs = torch.randn(8, 25, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    job.model(inputs).square().sum().backward()
    optimizer.step()


def frozen_of(job: Compressor) -> Tensor:
    group = job.groups[0]
    return (group.indices(group.sites[0]) >= 0).reshape(-1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_portions_are_frozen_when_due_and_never_thaw(bits: int, optimizer: str) -> None:
    job = job_of(bits)
    opt = OPTIMIZERS[optimizer](job.model.parameters())  # whose decay is on the master weights too
    steps = 5 * (len(PAPER[bits]) - 1)
    job.attach(opt, steps)
    counts = [int(frozen_of(job).sum())]
    for number in range(steps):
        frozen, before = frozen_of(job), weight_of(job.groups[0])
        step(job, opt, number)
        after = weight_of(job.groups[0])
        assert torch.equal(after[frozen], before[frozen])
        assert (after != before)[~frozen].all()
        assert frozen_of(job)[frozen].all()
        if (number + 1) % 5 == 0:
            counts.append(int(frozen_of(job).sum()))
        else:
            assert torch.equal(frozen_of(job), frozen)
    assert counts == [round(portion * 375) for portion in PAPER[bits]]


def test_the_largest_of_the_free_go_first_and_equals_in_order() -> None:
    group = group_of(torch.tensor([0.3, -1.0, 0.5, -0.5, 0.5, 0.1]), INQ(bits=2, portions=(0.5, 0.7, 1.0)))
    frozen = []
    with torch.no_grad():
        for progress in (0.0, 0.5, 1.0):
            group.on_step(progress)
            frozen.append((group.indices(group.sites[0]) >= 0).flatten().tolist())
    assert frozen[0] == [False, True, True, True, False, False]
    assert frozen[1] == [False, True, True, True, True, False]
    assert all(frozen[2])


def test_weights_rounded_down_are_not_ranked_again() -> None:
    """1.4 becomes 1 and then is smaller than a free weight that training took to 1.2: it stays frozen all the same."""
    group = group_of(torch.tensor([1.4, 1.1, 0.2, 0.1]), INQ(portions=(0.25, 0.5, 1.0)))
    with torch.no_grad():
        group.on_step(0.0)
        group.master_weight(group.sites[0]).copy_(torch.tensor([0.0, 1.2, 1.3, 0.1]))
        group.on_step(0.5)
    assert weight_of(group).tolist() == pytest.approx([1.0, 1.2, 1.0, 0.1])


def test_a_free_weight_that_grows_beyond_the_codebook_becomes_the_largest_codeword() -> None:
    group = group_of(torch.tensor([1.0, 0.3, -0.2]), INQ(portions=(0.3, 1.0)))
    with torch.no_grad():
        group.on_step(0.0)
        group.master_weight(group.sites[0]).copy_(torch.tensor([0.0, 1.5, -77.0]))
        group.on_step(1.0)
    assert weight_of(group).tolist() == [1.0, 1.0, -1.0]


def test_only_free_weights_have_a_gradient() -> None:
    group = group_of(torch.tensor([1.0, 0.6, 0.3, -0.2]), INQ(portions=(0.5, 1.0)))
    with torch.no_grad():
        group.on_step(0.0)
    site = group.sites[0]
    master: Any = group.master_weight(site)
    group.weight(site, master).sum().backward()
    assert master.grad.tolist() == [[0.0, 0.0, 1.0, 1.0]]


def test_rounds_begin_where_the_last_ended() -> None:
    group = group_of(torch.randn(100), INQ(bits=5))
    with torch.no_grad():
        told = [(step / 12, group.on_step(step / 12)) for step in [0, 0, *range(13), 12]]
    assert [(at, end) for at, end in told if end is not None] == [(0.0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1.0)]


def test_rounds_are_told_and_the_optimiser_forgets() -> None:
    job = job_of(5)
    told: list[tuple[int, int]] = []

    def on_round(parameters: list[Tensor], steps: int) -> None:
        assert any(parameter is job.groups[0].master_weight(job.groups[0].sites[0]) for parameter in parameters)
        assert not any(parameter in opt.state for parameter in parameters)
        told.append((job.steps, steps))

    opt = OPTIMIZERS["adam"](job.param_groups(lr=0.01))
    job.attach(opt, 9, on_round)
    for number in range(9):
        step(job, opt, number)
    assert told == [(0, 3), (3, 3), (6, 3)]


def test_fewer_steps_than_rounds_freeze_all_that_is_due() -> None:
    job = job_of(2)
    told: list[int] = []
    opt = OPTIMIZERS["sgd"](job.param_groups(lr=0.01))
    job.attach(opt, 2, lambda _, steps: told.append(steps))
    counts = [int(frozen_of(job).sum())]
    for number in range(2):
        step(job, opt, number)
        counts.append(int(frozen_of(job).sum()))
    assert counts == [75, 300, 375]
    assert told == [1, 1]


def test_a_single_portion_is_frozen_at_once() -> None:
    group = group_of(torch.randn(100), INQ(portions=(1.0,)))
    with torch.no_grad():
        assert group.on_step(0.0) is None
    assert (group.indices(group.sites[0]) >= 0).all()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resumed_in_the_middle_of_a_round_ends_in_the_same_bytes(optimizer: str) -> None:
    def start() -> tuple[Compressor, torch.optim.Optimizer]:
        job = job_of(4)
        opt = OPTIMIZERS[optimizer](job.param_groups(lr=0.01))
        job.attach(opt, 20)
        return job, opt

    whole, opt = start()
    for number in range(10):
        step(whole, opt, number)
    assert int(whole.groups[0].rounds) == 3  # type: ignore[arg-type]
    states = copy.deepcopy((whole.state_dict(), opt.state_dict()))
    for number in range(10, 20):
        step(whole, opt, number)
    resumed, opt = start()
    resumed.load_state_dict(states[0])
    opt.load_state_dict(states[1])
    for number in range(10, 20):
        step(resumed, opt, number)
    assert resumed.finish().to_bytes() == whole.finish().to_bytes()


@pytest.mark.parametrize("sparsity_by", [0.0, 0.6])
def test_pruned_weights_are_zero_and_not_counted(sparsity_by: float) -> None:
    job = job_of(5, sparsity=0.8, sparsity_by=sparsity_by)
    opt = OPTIMIZERS["adam"](job.param_groups(lr=0.01))
    job.attach(opt, 12)
    group = job.groups[0]
    if not sparsity_by:
        assert int(frozen_of(job).sum()) == round(0.5 * 75)
        assert not (frozen_of(job) & group.pruned(group.sites[0]).reshape(-1)).any()
    for number in range(12):
        frozen, before = frozen_of(job), weight_of(group)
        step(job, opt, number)
        kept = frozen & ~group.pruned(group.sites[0]).reshape(-1)
        assert torch.equal(weight_of(group)[kept], before[kept])
    trained, pruned = weight_of(group), group.pruned(group.sites[0]).reshape(-1)
    assert int(pruned.sum()) == 300
    assert (trained[pruned] == 0).all()
    packed = job.finish()
    weight: Any = job.model.weight
    assert torch.equal(weight.reshape(-1), trained)
    codewords = packed.content.books[0].expand().ravel()
    assert np.isin(trained.numpy(), codewords).all()
    assert len(codewords) <= 17


@pytest.mark.parametrize(
    "portions", [(0.5,), (0.5, 0.5, 1.0), (0.7, 0.5, 1.0), (0.0, 1.0), (-0.5, 1.0), (0.5, 1.1), (math.nan, 1.0)]
)
def test_portions_that_do_not_ascend_to_one_are_refused(portions: tuple[float, ...]) -> None:
    expected = r"scheme 'inq', setting 'portions': must be shares of the weights that ascend to 1, such as .*, got \("
    with pytest.raises(PolicyError, match=expected):
        make_scheme("inq", {"portions": portions})


def test_portions_are_read_from_lists() -> None:
    assert make_scheme("inq", {"bits": 3, "portions": [0.5, 1]}) == INQ(bits=3, portions=(0.5, 1.0))
