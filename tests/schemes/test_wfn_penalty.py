"""What draws the free weights of Weight Fixing Networks: its size, its gradient, and what it leaves alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional

from compressor.ops.relative_distance import frozen_lookup_with_distance, relative_distance
from tests.helpers.wfn_jobs import batch, fixed_count, job_of, momentum, network


def test_penalty_is_a_share_of_the_task_and_leaves_it_alone() -> None:
    job = job_of(network())
    job.attach(momentum(job), 100)
    for value in (0.01, 2.5):
        assert float(job.penalty(torch.tensor(value)).detach()) == pytest.approx(0.4 * value, rel=1e-6)
    task = torch.tensor(2.0, requires_grad=True)
    job.penalty(task).backward()
    assert task.grad is None
    off = job_of(network(), penalty_ratio=0.0)
    off.attach(momentum(off), 100)
    assert float(off.penalty(torch.tensor(1.0))) == 0


@pytest.mark.parametrize(("ratio", "loss"), [(0.0, 2.302585), (0.4, 3.223619), (1.0, 4.605170)])
def test_penalty_is_part_of_the_loss(ratio: float, loss: float) -> None:
    """With equal logits of ten classes, cross entropy is the logarithm of 10."""
    job = job_of(network(), penalty_ratio=ratio)
    job.attach(momentum(job), 100)
    assert job.loss(torch.zeros(3, 10), torch.tensor([0, 4, 9])).item() == pytest.approx(loss, rel=1e-6)


def test_penalty_is_of_the_weights_that_went_through_the_network() -> None:
    """Its gradient is that of the pull on the master weights, wherever in the step it is worked out."""
    job = job_of(network())
    job.attach(momentum(job), 100)
    group, (inputs, targets) = job.groups[0], batch()
    masters = [group.master_weight(site) for site in group.sites]
    alone = torch.autograd.grad(job.penalty(torch.tensor(2.0)), masters)
    task = functional.cross_entropy(job.model(inputs), targets)
    assert list(group.step_cache) == group.sites
    both = torch.autograd.grad(task + job.penalty(torch.tensor(2.0)), masters)
    assert not group.step_cache
    of_task = torch.autograd.grad(functional.cross_entropy(job.model(inputs), targets), masters)
    for one, *parts in zip(both, of_task, alone, strict=True):
        torch.testing.assert_close(one, parts[0] + parts[1])
    with torch.no_grad():
        job.model(inputs)
    assert not group.step_cache, "what went through before is forgotten"


def test_penalty_is_divided_by_the_pull_that_the_last_step_found() -> None:
    """In a round's first step by what there is to find; then by what was found with the gradient before it."""
    job = job_of(network())
    opt = momentum(job)
    job.attach(opt, 100)
    group = job.groups[0]
    settings: Any = group.zero_below
    sites = [
        (group.master_weight(s), group.codebook(), group.indices(s), settings[group.sites.index(s)])
        for s in group.sites
    ]

    def found() -> list[float]:
        return [float(relative_distance(*site)[0]) for site in sites]

    divisors = [sum(found())]
    for _ in range(3):
        opt.zero_grad()
        job.penalty(torch.tensor(2.0)).backward()
        for site in sites:
            drawn = frozen_lookup_with_distance(*site, torch.zeros(2, dtype=torch.float64))[1]
            (slope,) = torch.autograd.grad(drawn, site[0])
            torch.testing.assert_close(site[0].grad, 0.4 * 2 / divisors[-1] * slope)
        divisors.append(sum(found()))
        measured: Any = group.pulled
        assert measured[:, 0].tolist() == found()
        opt.step()
    assert len(set(divisors[1:])) == 3


def test_weights_that_drift_from_their_values_are_drawn_again() -> None:
    net = network()
    with torch.no_grad():
        net[0].weight.fill_(0.25), net[2].weight.fill_(0.25)
    job = job_of(net)
    group = job.groups[0]
    group.on_step(0.0)
    assert group.scheme.penalty(group, torch.tensor(1.0)) is None
    with torch.no_grad():
        group.master_weight(group.sites[0]).mul_(1.5)
    assert group.scheme.penalty(group, torch.tensor(1.0)) is not None


def test_a_layer_that_was_left_out_is_drawn_too() -> None:
    job = job_of(network())
    job.attach(momentum(job), 100)
    group = job.groups[0]
    first, second = group.sites
    group.weight(first, group.master_weight(first))
    assert list(group.step_cache) == [first]
    job.penalty(torch.tensor(1.0)).backward()
    for site in (first, second):
        gradient = group.master_weight(site).grad
        assert gradient is not None
        assert (gradient[group.indices(site) < 0] != 0).any()


def test_a_model_in_the_middle_of_a_step_is_copied() -> None:
    job = job_of(network())
    job.model(batch()[0])
    assert job.groups[0].step_cache
    copied: Any = copy.deepcopy(job.model)
    assert not copied.weight_sharing[0].step_cache


def test_nothing_to_pull_is_no_penalty() -> None:
    job = job_of(network())
    job.groups[0].on_step(1.0)
    assert job.groups[0].scheme.penalty(job.groups[0], torch.tensor(1.0)) is None
    net = network()
    with torch.no_grad():
        net[0].weight.fill_(0.25), net[2].weight.fill_(0.25)
    job = job_of(net)
    job.groups[0].on_step(0.0)
    assert fixed_count(job) > 0
    assert job.groups[0].scheme.penalty(job.groups[0], torch.tensor(1.0)) is None
