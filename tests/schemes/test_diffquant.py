"""Differentiable quantisation: quantiles, gradients of the points, points that overtake, weights that stand still."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from compressor.compressor import Compressor
from compressor.formats.file.reader import PackedFile
from compressor.policy.policy import Policy, Rule
from compressor.schemes.diffquant import DiffQuant, quantiles, redistributed
from compressor.sharing.group import Group
from compressor.sharing.registry import make_scheme
from tests.helpers.groups import bell, fitted, weight_of


def group_of(weights: Tensor, codewords: int = 4, importance: Tensor | None = None) -> Group:
    return fitted(DiffQuant(codewords), weights, importance)


def set_points(group: Group, *points: float) -> None:
    group.set_codebook(torch.tensor(points), learnt=True)


def job_of(model: nn.Module, **settings: Any) -> Compressor:
    return Compressor(model, Policy([Rule("*", scheme="diffquant", **settings)]), teacher=None).prepare()


@given(st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=60), st.integers(1, 9))
def test_quantiles_part_the_weights_into_equal_shares(weights: list[float], count: int) -> None:
    """No more weights lie strictly between neighbours than one share, and every quantile is one of the weights."""
    found = quantiles(torch.tensor(weights), count).tolist()
    assert found == sorted(set(found))
    assert 1 <= len(found) <= count
    assert set(found) <= set(weights)
    share = len(weights) / count
    assert max(sum(below < weight < above for weight in weights) for below, above in pairwise([-9, *found, 9])) <= share
    assert sum(weight < found[0] for weight in weights) <= share / 2


def test_quantiles_by_hand() -> None:
    assert quantiles(torch.arange(100.0), 5).tolist() == [9.0, 29.0, 49.0, 69.0, 89.0]
    assert quantiles(torch.arange(99.0), 1).tolist() == [49.0], "the median"
    assert quantiles(torch.tensor([2.0, 1.0, 2.0]), 2).tolist() == [1.0, 2.0], "few values are kept as they are"
    assert quantiles(torch.zeros(0), 3).tolist() == [0.0]


def test_important_weights_draw_the_quantiles() -> None:
    weights = torch.arange(100.0)
    importance = torch.where(weights < 20, 10.0, 1.0)
    assert (group_of(weights, 5, importance).codebook() < 20).sum() == 4
    nothing = group_of(weights, 5, torch.zeros(100)).codebook()
    assert torch.equal(nothing, group_of(weights, 5).codebook()), "no importance at all: all count alike"


def test_each_weight_takes_the_nearest_point() -> None:
    weights = bell()
    group = group_of(weights, 7)
    points = group.codebook().detach()
    nearest = (weights[:, None] - points).abs().argmin(dim=1)
    assert torch.equal(weight_of(group), points[nearest])


def test_gradient_of_a_point_is_the_sum_over_its_members() -> None:
    weights, gradient = bell(), torch.randn(400)
    group = group_of(weights, 5)
    points = group.codebook().detach()
    members = (weights[:, None] - points).abs().argmin(dim=1)
    weight_of(group).backward(gradient)
    wanted = torch.zeros(5).index_add_(0, members, gradient)
    factor = 5 / (group.weights * float(group.unit))  # of the group's units and its preconditioner
    assert group.values.grad is not None
    torch.testing.assert_close(group.values.grad / factor, wanted)


def test_the_weights_have_no_gradient_and_stand_still() -> None:
    torch.manual_seed(0)
    job = job_of(nn.Linear(16, 12), bits=2)
    group = job.groups[0]
    master = group.master_weight(group.sites[0])
    before, points = master.detach().clone(), group.codebook().detach().clone()
    opt = torch.optim.AdamW(job.param_groups(lr=0.1, weight_decay=0.5))
    job.attach(opt, 5)
    for _ in range(5):
        opt.zero_grad(set_to_none=False)
        job.model(torch.ones(2, 16)).square().mean().backward()
        opt.step()
    assert torch.equal(master, before)
    assert not torch.equal(group.codebook(), points)


def test_weights_change_sides_as_points_move() -> None:
    group = group_of(torch.tensor([-1.0, 0.0, 0.4, 1.0]), 2)
    set_points(group, -1.0, 1.0)
    assert weight_of(group).tolist() == [-1.0, -1.0, 1.0, 1.0]
    set_points(group, -1.0, 2.0)
    assert weight_of(group).tolist() == [-1.0, -1.0, -1.0, 2.0]


def test_points_that_overtake_each_other_are_sorted() -> None:
    weights = bell()
    group, sorted_group = group_of(weights, 3), group_of(weights, 3)
    set_points(group, 0.05, -0.05, 0.0)
    set_points(sorted_group, -0.05, 0.0, 0.05)
    assert torch.equal(weight_of(group), weight_of(sorted_group))
    gradient = torch.randn(400)
    for one in (group, sorted_group):
        weight_of(one).backward(gradient)
    assert group.values.grad is not None
    assert sorted_group.values.grad is not None
    assert torch.equal(group.values.grad[[1, 2, 0]], sorted_group.values.grad), "each has its own members' gradient"


def test_points_are_sorted_in_the_file_whatever_the_steps() -> None:
    torch.manual_seed(0)
    job = job_of(nn.Linear(16, 12), bits=3)
    opt = torch.optim.SGD(job.param_groups(lr=50.0), lr=50.0)
    job.attach(opt, 10)
    for _ in range(10):
        opt.zero_grad()
        job.model(torch.randn(4, 16)).square().mean().backward()
        opt.step()
    computed = job.model(torch.ones(1, 16))
    packed = job.finish()
    assert torch.equal(job.model(torch.ones(1, 16)), computed)
    with PackedFile.from_bytes(packed.to_bytes()) as file:
        values = file.books[0].expand().ravel().tolist()
    assert values == sorted(set(values))


def test_descent_finds_the_points() -> None:
    """Of weights in two clusters the points go where the loss wants them, and the members stay."""
    weights = torch.cat([torch.linspace(-1.1, -0.9, 50), torch.linspace(0.9, 1.1, 50)])
    group, target = group_of(weights, 2), torch.tensor([-0.5, 2.0]).repeat_interleave(50)
    for _ in range(100):
        (found,) = torch.autograd.grad((weight_of(group) - target).square().sum(), [group.values])
        group.values.data -= 0.1 * found
    torch.testing.assert_close(group.codebook().detach(), torch.tensor([-0.5, 2.0]), atol=1e-3, rtol=0)


def test_trains_and_ends_in_as_many_values_as_asked_for() -> None:
    torch.manual_seed(0)
    teacher, inputs = nn.Linear(16, 12), torch.randn(256, 16)
    wanted = teacher(inputs).detach()
    job = job_of(teacher, bits=2)
    job.groups[0].values.data *= 0.7  # or there would be next to nothing to learn
    start = float((job.model(inputs) - wanted).detach().square().mean())
    opt = torch.optim.AdamW(job.param_groups(lr=0.003))
    job.attach(opt, 100)
    for _ in range(100):
        opt.zero_grad()
        (job.model(inputs) - wanted).square().mean().backward()
        opt.step()
    assert float((job.model(inputs) - wanted).detach().square().mean()) < start / 1.5
    job.finish()
    found: Any = job.model.weight
    assert len(found.unique()) == 4


def test_pruned_weights_leave_one_value_for_zero() -> None:
    job = job_of(nn.Linear(16, 12), bits=2, sparsity=0.5)
    group = job.groups[0]
    survivors = group.survivors(group.sites[0])
    assert torch.equal(group.codebook(), quantiles(survivors, 3)), "zeros are no quantile"
    job.finish()
    found: Any = job.model.weight
    assert int((found == 0).sum()) == 96
    assert len(found.unique()) == 4


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_bits(bits: int) -> None:
    assert make_scheme("diffquant", {"bits": bits}) == DiffQuant(2**bits)


def two_layers(calibrated: bool, **settings: Any) -> Compressor:
    torch.manual_seed(0)
    first = nn.Linear(16, 12)
    nn.init.normal_(first.weight, std=20.0)  # so that the second layer has the larger gradient by far
    net = nn.Sequential(first, nn.ReLU(), nn.Linear(12, 20))
    job = Compressor(net, Policy([Rule("*", "diffquant", redistribute=True, **settings)]), teacher=None)
    batches = [(torch.randn(32, 16), torch.randint(20, (32,))) for _ in range(3)]
    return job.prepare(batches if calibrated else None)


def test_points_go_where_the_gradient_is() -> None:
    job = two_layers(calibrated=True, codewords=8)
    (group,) = job.groups
    first, second = group.lengths.tolist()  # type: ignore[operator]
    assert 4 <= first < 6
    assert 10 <= second <= 16 - first  # fewer where a weight would be picked twice
    weights = [group.weight(site, group.master_weight(site)) for site in group.sites]
    assert [len(weight.unique()) for weight in weights] == [first, second]
    computed = job.model(torch.ones(1, 16))
    with PackedFile.from_bytes(job.finish().to_bytes()) as file:
        assert [len(file.books[n].expand().ravel()) for n in (0, 1)] == [first, second]
        assert [site.book for site in file.sites.values()] == [0, 1]
        stored = [torch.from_numpy(file.tensor(name)) for name in file.sites]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(stored, weights, strict=True))
    assert torch.equal(job.model(torch.ones(1, 16)), computed)


def test_without_calibration_no_point_moves() -> None:
    (group,) = two_layers(calibrated=False, codewords=8).groups
    alone = [group_of(group.master_weight(site).detach(), 8).codebook() for site in group.sites]
    found = [group.weight(site, group.master_weight(site)).unique() for site in group.sites]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, alone, strict=True))


@given(st.integers(1, 40), st.lists(st.integers(0, 1000), min_size=1, max_size=20))
def test_redistribution_neither_adds_points_nor_starves_a_tensor(codewords: int, norms: list[int]) -> None:
    counts = redistributed(codewords, norms)
    assert sum(counts) == codewords * len(norms)
    assert min(counts) >= codewords / 2
    share = (codewords - (codewords + 1) // 2) * len(norms) / (sum(norms) or 1)
    if sum(norms):
        assert all(abs(c - (codewords + 1) // 2 - share * n) <= 1 for c, n in zip(counts, norms, strict=True))
