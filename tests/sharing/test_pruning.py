"""Magnitude pruning: levels, ties, what stays pruned, and the zeros that later stages keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compressor.compressor import Compressor
from compressor.formats.errors import PolicyError
from compressor.formats.file.reader import PackedFile
from compressor.policy.policy import Policy, Rule
from compressor.sharing.pruning import Pruning, smallest_mask
from compressor.sharing.registry import SCHEMES

SHARING = sorted(name for name, scheme in SCHEMES.items() if scheme.shares)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def job_of(scheme: str, model: nn.Module | None = None, **settings: Any) -> Compressor:
    policy = Policy([Rule("*", scheme=scheme, **settings)])
    return Compressor(model or net(), policy, teacher=None, preserve_sparsity=model is not None)


def train(job: Compressor, steps: int = 20) -> None:
    optimizer = torch.optim.AdamW(job.param_groups(lr=0.01, weight_decay=0.1))
    job.attach(optimizer, steps)
    inputs = torch.randn(32, 16)
    for _ in range(steps):
        optimizer.zero_grad()
        (job.model(inputs).square().mean() + job.penalty()).backward()
        optimizer.step()


def zeros(job: Compressor) -> list[float]:
    return [float((weight == 0).float().mean()) for name, weight in job.model.state_dict().items() if "weight" in name]


@given(st.floats(0, 0.99), st.floats(0, 1), st.lists(st.floats(0, 1), min_size=2))
def test_levels_rise_to_the_sparsity_and_stay(sparsity: float, by: float, moments: list[float]) -> None:
    pruning = Pruning(sparsity=sparsity, sparsity_by=by)
    levels = [pruning.level(moment) for moment in sorted(moments)]
    assert levels == sorted(levels)
    assert pruning.level(1.0) == pruning.level(by) == sparsity


def test_polynomial_decay_as_zhu_and_gupta_have_it() -> None:
    pruning = Pruning(sparsity=0.9, sparsity_by=0.5, sparsity_start=0.1)
    for t in (0.0, 0.1, 0.4):
        assert pruning.level(t) == pytest.approx(0.9 + (0.1 - 0.9) * (1 - t / 0.5) ** 3)


@given(
    start=st.floats(0, 0.5), end=st.floats(0.5, 0.99), begin=st.integers(0, 500), length=st.integers(1, 500),
    power=st.integers(1, 5), every=st.integers(1, 100), step=st.integers(0, 1200),
)  # fmt: skip
def test_a_schedule_in_steps_is_the_same_in_shares_of_them(
    start: float, end: float, begin: int, length: int, power: int, every: int, step: int
) -> None:
    """Shares are rounded quotients of steps; the looks are nevertheless after just the steps they are due."""
    last = begin + length
    pruning = Pruning(end, 1.0, start, begin / last, power, min(1.0, every / last))
    found = pruning.level(pruning.last_update(min(1.0, step / last)))
    looked = min(step, last) if step >= last else begin + (step - begin) // every * every
    left = 1 - (looked - begin) / length
    assert found == pytest.approx(0.0 if step < begin else end + (start - end) * left**power, abs=1e-9)


def test_nothing_is_pruned_before_it_begins() -> None:
    job = job_of("dense", sparsity=0.5, sparsity_start=0.25, sparsity_from=0.5, sparsity_by=1.0).prepare()
    optimizer = torch.optim.SGD(job.param_groups(lr=0.0), lr=0.0)
    job.attach(optimizer, 4)
    shares = []
    for _ in range(4):
        shares.append(zeros_of(job))
        optimizer.step()
    assert [*shares, zeros_of(job)] == [0.0, 0.0, 0.25, 0.46875, 0.5]


def zeros_of(job: Compressor) -> float:
    (site,) = job.groups[0].sites
    return float(job.groups[0].pruned(site).float().mean())


def test_the_smallest_are_pruned_and_stay_so() -> None:
    master = torch.tensor([0.5, -0.1, 0.1, 3.0])
    first = smallest_mask(master, 1, torch.zeros(4, dtype=torch.bool))
    assert first.tolist() == [False, True, False, False], "of equals the first"
    assert smallest_mask(torch.tensor([0.5, 9.0, 0.1, 3.0]), 2, first).tolist() == [False, True, True, False]


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
@pytest.mark.parametrize("by", [0.0, 0.5])
def test_every_scheme_prunes(scheme: str, by: float) -> None:
    """The share asked for is zero in the end, in computing as in the file, and stays zero under weight decay."""
    job = job_of(scheme, sparsity=0.75, sparsity_by=by).prepare()
    train(job)
    computed = job.model(torch.ones(1, 16))
    packed = job.finish()
    assert torch.equal(job.model(torch.ones(1, 16)), computed)
    assert all(share >= 0.75 for share in zeros(job))
    with PackedFile.from_bytes(packed.to_bytes()) as file:
        for name in file.sites:
            assert (file.tensor(name) == 0).mean() >= 0.75


def test_pruned_weights_do_not_move_the_codebook() -> None:
    """k-means sees the survivors alone, and leaves one of its values for zero."""
    job = job_of("kmeans", bits=2, sparsity=0.5).prepare()
    survivors = job.groups[0].survivors(job.groups[0].sites[0])
    assert len(survivors) == 256
    assert len(job.groups[0].codebook()) == 3
    job.finish()
    assert len(job.model[0].weight.unique()) == 4  # type: ignore[index]


@pytest.mark.parametrize("scheme", SHARING)
def test_later_stages_keep_the_zeros(scheme: str) -> None:
    first = job_of("dense", sparsity=0.8).prepare()
    train(first)
    first.finish()
    before = {name: weight == 0 for name, weight in first.model.state_dict().items() if "weight" in name}
    second = job_of(scheme, first.model).prepare()
    train(second)
    second.finish()
    for name, zero in before.items():
        assert (second.model.state_dict()[name][zero] == 0).all()


def test_without_being_told_zeros_may_change() -> None:
    """A layer that begins at zero must be able to learn."""
    model = net()
    nn.init.zeros_(model[2].weight)  # type: ignore[index]
    job = Compressor(model, Policy([Rule("0", scheme="kmeans", bits=2), Rule("2", scheme="dense")]), teacher=None)
    train(job.prepare())
    job.finish()
    assert not (job.model[2].weight == 0).all()  # type: ignore[index]


def test_dense_is_stored_untouched_as_it_was_trained() -> None:
    job = job_of("dense").prepare()
    train(job)
    trained = job.model(torch.ones(1, 16))
    packed = job.finish()
    assert not packed.content.sites
    assert torch.equal(job.model(torch.ones(1, 16)), trained)


def test_resumes_in_the_middle() -> None:
    whole, resumed = (job_of("kmeans", sparsity=0.9, sparsity_by=1.0).prepare() for _ in range(2))
    train(whole, 20)
    resumed.load_state_dict(whole.state_dict())
    assert torch.equal(resumed.model(torch.ones(1, 16)), whole.model(torch.ones(1, 16)))
    assert resumed.finish().to_bytes() == whole.finish().to_bytes()


@pytest.mark.parametrize(
    ("settings", "fault"),
    [({"sparsity": 1.0}, "sparsity"), ({"sparsity": -0.1}, "sparsity"), ({"sparsity_by": 0.5}, "without sparsity"),
     ({"sparsity": 0.5, "sparsity_by": 2}, "sparsity_by"), ({"sparsity": 0.5, "sparsity_power": 0}, "sparsity_power"),
     ({"sparsity": 0.5, "sparsity_from": 0.5, "sparsity_by": 0.4}, "0.4 is before sparsity_from 0.5"),
     ({"sparsity": "much"}, "sparsity")],
)  # fmt: skip
def test_impossible_settings(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(PolicyError, match=fault):
        Policy([Rule("*", scheme="kmeans", **settings)])


def test_a_rule_without_a_scheme_inherits_sparsity() -> None:
    policy = Policy([Rule("0", bits=8), Rule("1", sparsity=0.5), Rule("*", scheme="kmeans", bits=4, sparsity=0.9)])
    assert [pruning and pruning.sparsity for pruning in policy.prunings] == [0.9, 0.5, 0.9]
    assert policy.rules[0].settings["sparsity"] == 0.9
