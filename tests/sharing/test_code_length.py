"""The price of a group's bits: what is counted and when, and what weights gain from shorter codes."""

from __future__ import annotations

import math

import pytest
import torch

from compressor.compressor import Compressor
from compressor.policy.policy import Policy, Rule
from compressor.schemes.learnt import Learnt
from compressor.sharing.code_length import STEPS_BETWEEN_COUNTS, CodeLength, is_priced, lengths_of
from compressor.sharing.group import Group
from tests.helpers.groups import fitted

STEP_OF_ONE = math.log(2) / 12  # the price at which, without curvature, the step is 1


def group_of(*weights: float) -> Group:
    return fitted(Learnt(rate=STEP_OF_ONE), torch.tensor(weights))


def test_the_bits_are_the_entropy_of_the_indices() -> None:
    length = CodeLength(group_of(0.1, 0.2, -0.2, 0.4, 1.2, 0.9, -1.0, 3.0))
    assert length.bits == pytest.approx(4 * 1 + 2 * 2 + 3 + 3)
    assert length.grid[1] == 1.0
    counts = length.counts()
    assert counts[-length.grid[0] :][:4].tolist() == [4, 2, 0, 1]


def test_lengths_are_those_of_the_frequencies_with_half_a_weight_more() -> None:
    found = lengths_of(torch.tensor([3, 0, 1]))
    expected = [-math.log2((n + 0.5) / (4 + 1.5)) for n in (3, 0, 1)]
    assert found.tolist() == pytest.approx(expected)


def test_a_weight_is_drawn_to_the_shorter_code() -> None:
    group = group_of(*([0.0] * 50), *([1.0] * 10), 0.4, 0.6, -0.4, 1.3)
    (site,) = group.sites
    cost = Learnt(rate=STEP_OF_ONE).penalty(group, torch.ones(()))
    assert cost is not None
    price = CodeLength(group).price
    assert cost.item() == pytest.approx(price * CodeLength(group).bits)
    cost.backward()
    gradient = group.master_weight(site).grad
    assert gradient is not None
    lengths = lengths_of(CodeLength(group).counts())
    zero = -CodeLength(group).grid[0]
    levels = lengths[zero - 1 : zero + 3].tolist()
    towards_minus_one, towards_one, beyond_one = (
        price * (levels[1 + sign] - levels[1 + start]) for start, sign in ((0, -1), (0, 1), (1, 2))
    )
    expected = [towards_one, towards_one, -towards_minus_one, beyond_one]
    assert gradient[0, -4:].tolist() == pytest.approx(expected, rel=1e-5)
    assert towards_one > 0


def test_indices_are_counted_anew_at_every_so_many_steps() -> None:
    group = group_of(0.1, 1.0, 1.0, 0.0)
    length, before = CodeLength(group), CodeLength(group).bits
    length.on_step()
    with torch.no_grad():
        group.master_weight(group.sites[0]).zero_()
    for _ in range(STEPS_BETWEEN_COUNTS - 1):
        length.on_step()
        assert length.bits == before
    length.on_step()
    assert length.bits == 0


def test_pruned_weights_count_as_zeros() -> None:
    weights, pruned = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([True, False, False, False])
    length = CodeLength(fitted(Learnt(rate=STEP_OF_ONE), weights, pruned=pruned))
    assert length.bits == 4


def test_only_what_has_a_price_is_priced() -> None:
    assert is_priced(group_of(1.0, 2.0))
    assert not is_priced(fitted(Learnt(codewords=2), torch.tensor([1.0, 2.0])))
    assert Learnt(codewords=2).penalty(fitted(Learnt(codewords=2), torch.tensor([1.0, 2.0])), torch.ones(())) is None


def test_plain_descent_on_the_price_alone_makes_the_file_smaller() -> None:
    torch.manual_seed(0)
    policy = Policy([Rule("*", scheme="learnt", rate=1e-4)])
    job = Compressor(torch.nn.Linear(64, 64), policy, teacher=None).prepare()
    length = CodeLength(job.groups[0])
    length.reprice(1e-4, 0.0)
    opt, before = torch.optim.SGD(job.param_groups(lr=1.0), lr=1.0), length.bits
    job.attach(opt, 200)
    for _ in range(200):
        opt.zero_grad()
        job.penalty().backward()
        opt.step()
    assert length.bits < 0.8 * before


def test_the_price_in_training_is_that_of_the_grid_where_the_loss_was_measured() -> None:
    """Without images ``rate`` is the price of squared errors of weights, which says nothing of the loss."""
    weights = torch.randn(4, 4)
    measured = fitted(Learnt(rate=1e-4), weights, importance=torch.ones(4, 4))
    assert CodeLength(measured).price == 1e-4
    assert CodeLength(fitted(Learnt(rate=1e-4), weights)).price == 1e-7
    assert CodeLength(fitted(Learnt(rate=1e-9), weights)).price == 1e-9
