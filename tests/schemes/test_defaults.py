"""Defaults of the schemes, by their effect on weights that are simple enough to say what it must be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from compressor import Compressor, Policy, Rule
from compressor.sharing.group import Group

SHARES = [30, 60, 80, 90, 95, 97, 99, 99, 99, 100]
"""Of 100 weights, how many are fixed after each of the ten rounds that the paper of weight fixing has."""


def group_of(weights: list[float], **rule: Any) -> Group:
    layer = nn.Linear(len(weights), 1, bias=False)
    layer.weight.data = torch.tensor([weights])
    return Compressor(layer, Policy([Rule("*", **rule)]), teacher=None).prepare().groups[0]


def weights_of(group: Group) -> list[float]:
    (site,) = group.sites
    values: list[float] = group.weight(site, group.master_weight(site)).detach().flatten().tolist()
    return values


def hundredths() -> list[float]:
    return [number / 100 for number in range(1, 101)]


def test_ttq_makes_zero_what_is_up_to_a_twentieth_of_the_largest() -> None:
    group = group_of([-2.0, 0.11, 0.09, -0.11, -0.09, 0.0], scheme="ttq")
    assert [np.sign(weight) for weight in weights_of(group)] == [-1, 1, 0, -1, 0, 0]


def test_wfn_fixes_the_papers_shares() -> None:
    """The first before the first step, the last after the last."""
    group, shares = group_of(hundredths(), scheme="wfn"), []
    for number in range(10):
        group.on_step(number / 9)
        shares.append(int((group.indices(group.sites[0]) >= 0).sum()))
    assert shares == SHARES


def test_wfn_fixes_to_zero_what_is_within_a_quarter_of_a_standard_deviation() -> None:
    """Of 0.01, 0.02 .. 1.00 it is 0.2887: a quarter of it is 0.0722."""
    group = group_of(hundredths(), scheme="wfn")
    group.on_step(0.0)
    indices = group.indices(group.sites[0]).flatten()
    assert group.codebook().tolist()[0] == 0.0
    assert torch.nonzero(indices == 0).flatten().tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_wfn_allows_ten_times_delta_in_the_first_round_and_delta_in_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, float]] = []

    def fix(weights: Any, wanted: int, tolerance: float, *_: object) -> tuple[Any, Any]:
        seen.append((wanted, tolerance))
        chosen = np.full(len(weights), -1, np.int32)
        chosen[:wanted] = 0
        return np.ones(1, np.float32), chosen

    monkeypatch.setattr("compressor.schemes.wfn.fix", fix)
    group = group_of([1.0] * 10_000, scheme="wfn", zero_distance=0.0)
    for number in range(10):
        group.on_step(number / 9)
    assert [wanted for wanted, _ in seen] == [3000, 3000, 2000, 1000, 500, 250, 150, 75, 15, 10]
    allowed = [0.1, 0.09, 0.08, 0.07, 0.06, 0.05, 0.04, 0.03, 0.02, 0.01]
    assert [tolerance for _, tolerance in seen] == pytest.approx(allowed, abs=1e-9)


@pytest.mark.parametrize(("progress", "used"), [(0.79, 3), (0.8, 4), (0.89, 4)])
def test_learnt_puts_codewords_back_to_use_up_to_four_fifths_of_the_training(progress: float, used: int) -> None:
    group = group_of([-3.0, -2.9, -1.0, -0.9, 1.0, 1.1, 3.0, 3.1], scheme="learnt", codewords=4)
    group.on_step(0.7)
    group.values.data[0] = 50.0  # of no use to any weight
    assert len(set(weights_of(group))) == 3
    with torch.no_grad():
        group.on_step(progress)
    assert len(set(weights_of(group))) == used


def test_learnt_puts_no_codeword_back_to_use_after_four_fifths() -> None:
    group = group_of([-3.0, -2.9, -1.0, -0.9, 1.0, 1.1, 3.0, 3.1], scheme="learnt", codewords=4)
    group.on_step(0.8)
    group.values.data[0] = 50.0
    for progress in (0.85, 0.9, 0.95, 0.999, 1.0):
        with torch.no_grad():
            group.on_step(progress)
        assert len(set(weights_of(group))) == 3


def test_uniform_fills_its_last_bucket_with_no_other_weight() -> None:
    """Of the three weights in it the least is 1 and the largest 2: no zero is among them."""
    group = group_of([0.0, 1.0, 0.0, 1.0, 1.0, 1.25, 2.0], scheme="uniform", bits=1, bucket=4)
    assert weights_of(group) == [0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 2.0]
