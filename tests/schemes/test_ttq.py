"""Trained ternary quantisation: the paper's three values, its gradients entry by entry, and the sign of one of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.compressor import Compressor
from compressor.formats.errors import PolicyError
from compressor.policy.policy import Policy, Rule
from compressor.schemes.ttq import TTQ, ternary
from compressor.sharing.group import Group
from compressor.sharing.registry import make_scheme
from tests.helpers.groups import bell, fitted, weight_of


def group_of(weights: Tensor, importance: Tensor | None = None, **settings: Any) -> Group:
    return fitted(TTQ(**settings), weights, importance)


def scales_of(group: Group) -> list[float]:
    found: list[float] = group.codebook().tolist()
    return found


def gradient_of(group: Group, target: Tensor) -> Tensor:
    """The gradient of the scales, as the optimiser sees it, of the squared distance to a target."""
    (found,) = torch.autograd.grad((weight_of(group) - target).square().sum(), [group.values])
    return found


def codes_of(group: Group) -> Tensor:
    assert isinstance(group.scheme, TTQ)
    return group.scheme.codes(group, group.sites[0], group.master_weight(group.sites[0])).reshape(-1)


def job_of(model: nn.Module, **settings: Any) -> Compressor:
    return Compressor(model, Policy([Rule("*", scheme="ttq", **settings)]), teacher=None).prepare()


def set_scales(group: Group, negative: float, positive: float) -> None:
    group.set_codebook(torch.tensor([negative, positive]), learnt=True)


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.3])
def test_threshold_as_the_paper_has_it(threshold: float) -> None:
    weights = bell()
    group = group_of(weights, threshold=threshold)
    set_scales(group, 0.5, 0.25)
    border = threshold * weights.abs().max()
    wanted = [0.25 if w > border else -0.5 if w < -border else 0.0 for w in weights]
    assert weight_of(group).tolist() == wanted


def test_on_the_threshold_is_zero() -> None:
    group = group_of(torch.tensor([-1.0, -0.5, 0.5, 1.0]), threshold=0.5)
    assert (weight_of(group) != 0).tolist() == [True, False, False, True]


def test_scales_start_at_the_means_of_the_survivors() -> None:
    weights = torch.tensor([-4.0, -2.0, -0.125, 0.0, 0.125, 2.0, 3.0])
    assert scales_of(group_of(weights)) == [3.0, 2.5]


def test_important_weights_count_for_more() -> None:
    weights, importance = torch.tensor([-4.0, -2.0, 2.0, 3.0]), torch.tensor([3.0, 1.0, 0.0, 0.0])
    assert scales_of(group_of(weights, importance)) == [3.5, 2.5], "no importance at all: all count alike"


def test_a_side_without_weights_starts_as_the_other() -> None:
    assert scales_of(group_of(torch.tensor([1.0, 2.0, 3.0, 2.0]))) == [2.0, 2.0]
    assert all(0 < scale < 0.01 for scale in scales_of(group_of(torch.zeros(4))))


def test_gradients_are_the_papers_three_formulas() -> None:
    master = bell().double().float().requires_grad_()
    scales = torch.tensor([0.5, 0.25], requires_grad=True)
    codes = (torch.arange(400) % 3).int()
    gradient = torch.randn(400)
    ternary(master, scales, codes).backward(gradient)
    assert master.grad is not None
    assert scales.grad is not None
    assert torch.equal(master.grad, gradient * torch.tensor([0.5, 1.0, 0.25])[codes])
    wanted = torch.stack([-gradient[codes == 0].sum(), gradient[codes == 2].sum()])
    torch.testing.assert_close(scales.grad, wanted)


@pytest.mark.parametrize("which", [0, 1])
def test_gradients_of_the_scales_by_finite_differences(which: int) -> None:
    """A public port ascends where it should descend: its gradient of Wn lacks the minus sign."""
    weights, target = bell(), bell().flip(0)
    group = group_of(weights)

    def loss(shift: float) -> float:
        scales = torch.tensor(scales_of(group))
        scales[which] += shift
        weight = ternary(weights, scales, codes_of(group))
        return float((weight.double() - target).square().sum())

    numeric = (loss(1e-3) - loss(-1e-3)) / 2e-3
    factor = len(group.values) / (group.weights * float(group.unit))  # of the group's units and its preconditioner
    assert float(gradient_of(group, target)[which]) / factor == pytest.approx(numeric, rel=1e-3)


def test_descent_brings_both_scales_to_their_targets() -> None:
    group = group_of(torch.tensor([-1.0, 1.0]).repeat(50), threshold=0.5)
    target = torch.tensor([-2.0, 0.5]).repeat(50)
    for _ in range(200):
        group.values.data -= 0.1 * gradient_of(group, target)
    torch.testing.assert_close(torch.tensor(scales_of(group)), torch.tensor([2.0, 0.5]), atol=1e-3, rtol=0)


def test_antisymmetric_weights_keep_equal_scales_under_antisymmetric_gradients() -> None:
    half = bell()
    group = group_of(torch.stack([half, -half], dim=1).reshape(-1))
    target = torch.stack([half, -half], dim=1).reshape(-1) * 3
    for _ in range(20):
        group.values.data -= 0.1 * gradient_of(group, target)
    negative, positive = scales_of(group)
    assert negative == pytest.approx(positive, rel=1e-5)
    assert positive > float(half.abs().mean()) * 2, "they moved"


@pytest.mark.parametrize("share", [0.1, 0.333, 0.5, 0.999])
def test_a_share_of_zeros_is_exact(share: float) -> None:
    weights = bell()
    group = group_of(weights, zeros=share)
    found = weight_of(group) == 0
    assert int(found.sum()) == math.floor(share * 400)
    assert weights[found].abs().max() <= weights[~found].abs().min()


def test_a_share_of_zeros_is_exact_among_equals() -> None:
    found = weight_of(group_of(torch.tensor([-1.0, 1.0, -1.0, 2.0, 1.0, -1.0]), zeros=0.5)) == 0
    assert found.tolist() == [True, True, True, False, False, False], "the first in order"


@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize("factor", [2.0**-30, 0.3, 7.0, 2.0**40])
def test_codes_do_not_depend_on_the_size_of_the_weights(zeros: float, factor: float) -> None:
    signs = [weight_of(group_of(weights, zeros=zeros)).sign() for weights in (bell(), bell() * factor)]
    assert torch.equal(*signs)


def test_zeros_come_back_as_their_latent_weights_grow() -> None:
    group = group_of(torch.tensor([0.01, -1.0, 1.0, 0.5]))
    assert weight_of(group).tolist()[0] == 0
    group.master_weight(group.sites[0]).data[0, 0] = 0.2
    assert weight_of(group).tolist()[0] == scales_of(group)[1]


def test_scales_stop_at_zero() -> None:
    group = group_of(bell())
    with torch.no_grad():
        group.values -= 10
        group.on_step(0.5)
    assert scales_of(group) == [0.0, 0.0]
    assert (gradient_of(group, bell()) < 0).all(), "and may leave it"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_huge_gradients_stay_finite(dtype: torch.dtype) -> None:
    group = group_of((bell() * 1e4).to(dtype))
    weight_of(group).backward(torch.full((400,), torch.finfo(dtype).max, dtype=dtype))
    gradient = group.master_weight(group.sites[0]).grad
    assert gradient is not None
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("settings", [{}, {"zeros": 0.5}])
def test_trains_to_three_values_in_the_file(settings: dict[str, float]) -> None:
    torch.manual_seed(0)
    teacher, inputs = nn.Linear(16, 12), torch.randn(256, 16)
    wanted = teacher(inputs).detach()
    job = job_of(nn.Linear(16, 12), **settings)
    start = float((job.model(inputs) - wanted).detach().square().mean())
    opt = torch.optim.AdamW(job.param_groups(lr=0.01))
    job.attach(opt, 100)
    for _ in range(100):
        opt.zero_grad()
        (job.model(inputs) - wanted).square().mean().backward()
        opt.step()
    assert float((job.model(inputs) - wanted).detach().square().mean()) < start / 3
    negative, positive = scales_of(job.groups[0])
    job.finish()
    found: Any = job.model.weight
    assert sorted(found.unique().tolist()) == [-negative, 0.0, positive]
    if settings:
        assert int((found == 0).sum()) == 96


def test_pruned_weights_stay_zero_and_set_no_threshold() -> None:
    group = job_of(nn.Linear(16, 12), sparsity=0.5).groups[0]
    pruned, codes = group.pruned(group.sites[0]), codes_of(group)
    group.master_weight(group.sites[0]).data[pruned] = 1e6
    assert torch.equal(codes_of(group), codes)
    assert (codes[pruned.reshape(-1)] == 1).all()


def test_bits_are_two() -> None:
    assert make_scheme("ttq", {"bits": 2, "threshold": 0.1}) == TTQ(threshold=0.1)
    for bits in (1, 3, 4):
        with pytest.raises(PolicyError, match="2 bits"):
            make_scheme("ttq", {"bits": bits})


@pytest.mark.parametrize("settings", [{"threshold": 1.0}, {"threshold": -0.1}, {"zeros": 1.0}, {"zeros": -0.5}])
def test_impossible_settings(settings: dict[str, float]) -> None:
    with pytest.raises(PolicyError, match=next(iter(settings))):
        make_scheme("ttq", settings)
