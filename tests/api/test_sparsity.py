"""prune_low_magnitude and its schedules, step by step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compressor.api.sparsity import (
    ConstantSparsity,
    PolynomialDecay,
    UpdatePruningStep,
    prune_low_magnitude,
    strip_pruning,
)
from compressor.formats.errors import UsageError
from tests.helpers.wrapped import images, net, train, weights


def reference_sparsity(schedule: PolynomialDecay, steps: int) -> list[float]:
    """The share of zeros before each step, as TFMOT's schedule says it: level and turn."""
    shares, share = [], 0.0
    for step in range(steps):
        begin, end = schedule.begin_step, schedule.end_step
        done = min(1.0, max(0.0, (step - begin) / (end - begin)))
        level = (schedule.initial_sparsity - schedule.final_sparsity) * (1 - done) ** schedule.power
        # On purpose there is one more turn at the end, or a frequency that does not divide misses the final sparsity.
        if begin <= step <= end and ((step - begin) % schedule.frequency == 0 or step == end):
            share = level + schedule.final_sparsity
        shares.append(share)
    return shares


@settings(max_examples=40, deadline=None)
@given(
    begin=st.integers(0, 30), length=st.integers(1, 60), power=st.sampled_from([1, 2, 3, 4]),
    frequency=st.integers(1, 100), initial=st.floats(0, 0.5), final=st.floats(0.5, 0.95),
)  # fmt: skip
def test_the_polynomial_is_tfmots_step_by_step(
    begin: int, length: int, power: int, frequency: int, initial: float, final: float
) -> None:
    schedule = PolynomialDecay(initial, final, begin, begin + length, power, frequency)
    pruned = prune_low_magnitude(nn.Linear(40, 25, bias=False), schedule)
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.0)
    callback = UpdatePruningStep(pruned, optimizer)
    shares = []
    for _ in range(begin + length + 3):
        shares.append(float((weights(pruned)[0] == 0).float().mean()))
        optimizer.step()
    assert callback.step == begin + length + 3
    assert shares == pytest.approx(reference_sparsity(schedule, begin + length + 3), abs=0.00051), "of 1,000 weights"


@pytest.mark.parametrize("more", [{}, {"end_step": 9, "frequency": 3}])
@pytest.mark.parametrize("begin", [0, 4])
def test_constant_sparsity_prunes_the_smallest_from_a_step_on(begin: int, more: dict[str, int]) -> None:
    pruned = prune_low_magnitude(net(), ConstantSparsity(0.75, begin_step=begin, **more))
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.01)
    UpdatePruningStep(pruned, optimizer)
    train(pruned, optimizer, begin)
    dense, now = weights(net()), weights(pruned)
    for before, after in zip(dense, now, strict=True):
        assert int((after == 0).sum()) == round(0.75 * after.numel())
        if begin == 0:
            assert before[after == 0].abs().max() <= before[after != 0].abs().min()


def test_pruned_weights_stay_pruned_and_strip_to_zeros(tmp_path: Path) -> None:
    def wrapped(seed: int) -> nn.Module:
        return prune_low_magnitude(net(seed), PolynomialDecay(0.2, 0.8, begin_step=2, end_step=10, frequency=1))

    pruned = wrapped(0)
    optimizer = torch.optim.AdamW(pruned.parameters(), lr=0.01, weight_decay=0.1)
    UpdatePruningStep(pruned, optimizer)
    train(pruned, optimizer, 6)
    with pytest.raises(UsageError, match=r"0\.weight: .* pruned, not yet 80\.0%: train up to step 10 with Update"):
        strip_pruning(pruned)
    half_way = [weight == 0 for weight in weights(pruned)]
    train(pruned, optimizer, 6)
    stripped = strip_pruning(pruned)
    for zero, weight in zip(half_way, weights(stripped), strict=True):
        assert (weight[zero] == 0).all()
        assert int((weight == 0).sum()) == round(0.8 * weight.numel())
    assert torch.equal(stripped(images()), pruned(images()))
    torch.save(pruned.state_dict(), tmp_path / "model.pt")
    fresh = wrapped(9)
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))  # noqa: TID251  (as a user would)
    assert torch.equal(strip_pruning(fresh).eval()(images()), pruned(images()))


def test_constant_sparsity_leaves_weights_alone_before_its_step() -> None:
    pruned = prune_low_magnitude(nn.Linear(40, 25, bias=False), ConstantSparsity(0.75, begin_step=3))
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.0)
    UpdatePruningStep(pruned, optimizer)
    zeros = []
    for _ in range(5):
        zeros.append(int((weights(pruned)[0] == 0).sum()))
        optimizer.step()
    assert zeros == [0, 0, 0, 750, 750]
