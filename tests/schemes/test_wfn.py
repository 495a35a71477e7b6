"""Weight fixing in rounds: what is fixed when, and that it stays so."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from compressor.compressor import Compressor
from compressor.formats.errors import PolicyError
from compressor.policy.policy import Policy, Rule
from compressor.schemes.wfn import FRACTIONS
from compressor.sharing.registry import make_scheme
from tests.helpers.wfn_jobs import ROUNDS, batch, fixed_count, job_of, momentum, network, train, zero_shares


def test_each_round_fixes_its_share_for_good() -> None:
    job = job_of(network(3.0))
    group, total = job.groups[0], 32 * 64 + 64 * 10
    opt = momentum(job)
    job.attach(opt, ROUNDS - 1)
    for share in FRACTIONS:
        assert fixed_count(job) == int(total * share)
        before = [group.indices(site).clone() for site in group.sites]
        weights = [group.weight(site, group.master_weight(site)).detach().clone() for site in group.sites]
        if share == 1:
            break
        train(job, opt, 1)
        for site, index, weight in zip(group.sites, before, weights, strict=True):
            assert torch.equal(group.indices(site)[index >= 0], index[index >= 0])
            assert torch.equal(group.weight(site, group.master_weight(site))[index >= 0], weight[index >= 0])


def test_after_calibration_each_round_fixes_its_share_to_values_that_were_all_found_before() -> None:
    rule = Policy([Rule("*", scheme="wfn", delta=0.05)])
    job = Compressor(network(), rule, teacher=None).prepare(torch.randn(64, 32))
    group, total = job.groups[0], 32 * 64 + 64 * 10
    values = group.codebook().clone()
    job.attach(opt := momentum(job), ROUNDS - 1)
    for number, share in enumerate(FRACTIONS):
        assert fixed_count(job) == int(total * share)
        assert torch.equal(group.codebook(), values)
        before = [group.indices(site).clone() for site in group.sites]
        if number < ROUNDS - 1:
            train(job, opt, 1)
        for site, index in zip(group.sites, before, strict=True):
            assert torch.equal(group.indices(site)[index >= 0], index[index >= 0])


def test_free_weights_train_and_only_they() -> None:
    job = job_of(network())
    opt = torch.optim.SGD(job.param_groups(lr=0.1), lr=0.1)
    job.attach(opt, 1000)
    inputs, targets = batch()
    job.loss(job.model(inputs), targets).backward()
    for site in job.groups[0].sites:
        gradient, free = job.groups[0].master_weight(site).grad, job.groups[0].indices(site) < 0
        assert gradient is not None
        assert (gradient[~free] == 0).all()
        assert (gradient[free] != 0).any()


def test_rounds_end_where_the_next_begins() -> None:
    group = job_of(network()).groups[0]
    ends = [group.on_step(step / 90) for step in range(91)]
    begun = [step for step, end in enumerate(ends) if end is not None]
    assert begun == list(range(0, 81, 10))
    assert [end for end in ends if end is not None] == [pytest.approx(n / 9) for n in range(1, 10)]
    assert group.on_step(1.0) is None


def test_a_round_whose_progress_was_rounded_down_begins_in_time() -> None:
    assert 1 / 49 * 49 < 1
    group = job_of(network(), fractions=[number / 50 for number in range(1, 51)]).groups[0]
    assert [group.on_step(step / 49) for step in range(3)] == [1 / 49, 2 / 49, 3 / 49]


def test_rounds_that_were_passed_over_are_made_up_for() -> None:
    leap, steady = (job_of(network()).groups[0] for _ in range(2))
    leap.on_step(0.5)
    for number in range(5):
        steady.on_step(number / 9)
    assert torch.equal(leap.codebook(), steady.codebook())
    for one, two in zip(leap.sites, steady.sites, strict=True):
        assert torch.equal(leap.indices(one), steady.indices(two))


def test_more_zeros_than_the_round_wants_are_fixed_nearest_first() -> None:
    job = job_of(network(), zero_distance=3.0)
    group = job.groups[0]
    group.on_step(0.0)
    assert fixed_count(job) == int(group.weights * FRACTIONS[0])
    for site in group.sites:
        fixed = group.indices(site) == 0
        assert site.tensor[fixed].abs().max() < site.tensor[~fixed].abs().min()


def test_pruned_weights_count_as_fixed() -> None:
    job = job_of(network(), sparsity=0.7)
    opt = momentum(job)
    job.attach(opt, ROUNDS - 1)
    assert fixed_count(job) == 0  # 70 % are pruned, the first round wants 30 %
    train(job, opt, ROUNDS - 1)
    job.finish()
    assert all(share >= 0.7 for share in zero_shares(job))


def test_resumed_in_the_middle_of_a_round() -> None:
    def start() -> tuple[Compressor, torch.optim.Optimizer]:
        job = job_of(network())
        opt = torch.optim.AdamW(job.param_groups(lr=0.01))
        job.attach(opt, 45)
        return job, opt

    whole, opt = start()
    train(whole, opt, 17)  # rounds take five steps each: this is within the fourth
    assert int(whole.groups[0].rounds) == 4  # type: ignore[arg-type]
    states = copy.deepcopy((whole.state_dict(), opt.state_dict()))
    train(whole, opt, 28)
    resumed, opt = start()
    resumed.load_state_dict(states[0])
    opt.load_state_dict(states[1])
    train(resumed, opt, 28)
    assert resumed.finish().to_bytes() == whole.finish().to_bytes()


def test_finetuning_keeps_what_a_trained_network_knows() -> None:
    net = network()
    inputs = torch.randn(256, 32)
    targets = (inputs[:, :10] + inputs[:, 10:20]).argmax(1)
    opt = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(150):
        opt.zero_grad()
        functional.cross_entropy(net(inputs), targets).backward()
        opt.step()

    @torch.no_grad()
    def right(model: Any) -> float:
        return float((model(inputs).argmax(1) == targets).float().mean())

    loader = DataLoader(TensorDataset(inputs, targets), batch_size=32, shuffle=True)
    job = job_of(net).finetune(loader, epochs=3, lr=1e-3)
    assert len(job.finish().content.books) == 1
    assert right(net) > 0.95
    assert right(job.model) > right(net) - 0.02


def test_bits_are_refused_and_fractions_checked() -> None:
    with pytest.raises(PolicyError, match="delta"):
        make_scheme("wfn", {"bits": 4})
    assert make_scheme("wfn", {"fractions": [0.5, 1.0]}) == make_scheme("wfn", {"fractions": (0.5, 1)})
    for wrong in ([], [0.5], [0.5, 0.5, 1.0], [0.6, 0.5, 1.0], [0.0, 1.0], [0.5, 1.5]):
        with pytest.raises(PolicyError, match="fractions"):
            make_scheme("wfn", {"fractions": wrong})
    with pytest.raises(PolicyError, match="delta"):
        make_scheme("wfn", {"delta": 0.0})


@pytest.mark.parametrize("fractions", [[1.0], [0.5, 1.0]])
def test_few_rounds(fractions: list[float]) -> None:
    job = job_of(network(), fractions=fractions)
    opt = momentum(job)
    job.attach(opt, 4)
    assert fixed_count(job) == int(job.groups[0].weights * fractions[0])
    train(job, opt, 4)
    assert fixed_count(job) == job.groups[0].weights
