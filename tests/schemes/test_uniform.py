"""Uniform quantisation in buckets: the paper's formula, its ends, short and constant buckets, zeros that stay zero."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from compressor.compressor import Compressor
from compressor.formats.errors import PolicyError
from compressor.formats.file.reader import PackedFile
from compressor.lifecycle.convert import decode_tensor
from compressor.policy.policy import Policy, Rule
from compressor.schemes.diffquant import DiffQuant
from compressor.schemes.uniform import Uniform
from compressor.sharing.group import Group
from compressor.sharing.registry import make_scheme
from tests.helpers.groups import bell, fitted, weight_of

LARGE = 2.0**126  # half a step beyond the largest is a number of float32 still


def group_of(weights: Tensor, pruned: Tensor | None = None, **settings: Any) -> Group:
    return fitted(Uniform(**settings), weights, pruned=pruned)


def rounded(weights: Tensor, **settings: Any) -> Tensor:
    return weight_of(group_of(weights, **settings)).detach()


def decoded_of(group: Group) -> Tensor:
    shared = group.scheme.export(group)
    (tensor,) = shared.tensors.values()
    return decode_tensor(tensor, shared.books[tensor.book]).reshape(-1)


def formula(weights: Tensor, bits: int, bucket: int) -> Tensor:
    """The paper's, in float64."""
    found = []
    for run in weights.double().split(bucket):
        alpha, beta, most = run.max() - run.min(), run.min(), 2**bits - 1
        found.append(((run - beta) / alpha * most).round() / most * alpha + beta if alpha > 0 else run)
    return torch.cat(found)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("bucket", [7, 256, 600, 5000])
def test_as_the_paper_has_it(bits: int, bucket: int) -> None:
    weights = bell(600)
    found = rounded(weights, bits=bits, bucket=bucket)
    torch.testing.assert_close(found.double(), formula(weights, bits, bucket), atol=1e-7, rtol=0)
    assert all(len(run.unique()) <= 2**bits for run in found.split(bucket))


def test_the_ends_of_a_bucket_are_kept() -> None:
    weights = bell(600)
    for run, found in zip(weights.split(256), rounded(weights).split(256), strict=True):
        assert found[run.argmin()] == run.min()
        torch.testing.assert_close(found[run.argmax()], run.max(), atol=0, rtol=2.0**-22)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_rounding_again_changes_nothing(bits: int, seed: int) -> None:
    torch.manual_seed(seed)
    once = rounded(torch.randn(600), bits=bits)
    again = rounded(once, bits=bits)
    torch.testing.assert_close(again, once, atol=0, rtol=1e-6)
    for one, other in zip(once.split(256), again.split(256), strict=True):
        assert torch.equal(one.unique(return_inverse=True)[1], other.unique(return_inverse=True)[1])


@pytest.mark.parametrize("value", [0.0, -0.3, 1e-38, 1e38])
def test_a_constant_bucket_is_left_as_it_is(value: float) -> None:
    weights = torch.cat([torch.full((256,), value), torch.tensor([value])])
    assert torch.equal(rounded(weights), weights)


def test_a_bucket_of_all_weights_is_one_per_tensor() -> None:
    weights = bell(600)
    whole = rounded(weights, bucket=600)
    assert torch.equal(rounded(weights, bucket=1 << 20), whole)
    assert len(whole.unique()) <= 16
    assert len(rounded(weights, bucket=256).unique()) > 16


def test_buckets_know_nothing_of_each_other() -> None:
    weights = bell(600)
    whole = rounded(weights)
    apart = torch.cat([rounded(run) for run in weights.split(256)])
    assert torch.equal(whole, apart), "nor does what fills the last one count"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("bits", [1, 4, 8, 12])
def test_decodes_to_what_was_computed(bits: int, pruned: bool, dtype: torch.dtype) -> None:
    weights = (bell(600) + 0.02).to(dtype)
    group = group_of(weights, weights.abs() < 0.03 if pruned else None, bits=bits)
    computed = weight_of(group).detach()
    assert computed.dtype == dtype
    assert torch.equal(decoded_of(group), computed)


@given(
    st.lists(st.floats(-LARGE, LARGE, width=32), min_size=1, max_size=40),
    st.integers(1, 16),
    st.integers(1, 50),
    st.integers(0, 2**40 - 1),
)
def test_any_numbers_stay_finite_and_decode_exactly(weights: list[float], bits: int, bucket: int, marks: int) -> None:
    pruned = torch.tensor([bool(marks >> n & 1) for n in range(len(weights))])
    group = group_of(torch.tensor(weights), pruned, bits=bits, bucket=bucket)
    computed = weight_of(group).detach()
    assert torch.isfinite(computed).all()
    assert (computed[pruned] == 0).all()
    assert torch.equal(decoded_of(group), computed)


@pytest.mark.parametrize("shift", [-1.0, -0.02, 0.0, 0.02, 1.0])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_pruned_weights_are_exactly_zero_and_the_others_near(bits: int, shift: float) -> None:
    weights = bell(600) + shift
    pruned = torch.arange(600) % 3 == 0
    pruned[512:] = False
    group = group_of(weights, pruned, bits=bits)
    found, plain = decoded_of(group), rounded(weights, bits=bits)
    assert (found[pruned] == 0).all()
    assert torch.equal(found[512:], plain[512:]), "a bucket without pruned weights is as if there were none"
    runs = [torch.cat([run, run.new_zeros(1)]) for run in weights.split(256)]
    steps = torch.stack([(run.max() - run.min()) / (2**bits - 1) for run in runs]).repeat_interleave(256)[:600]
    assert ((found - weights).abs() <= steps * 1.001)[~pruned].all(), "a whole step at the end that was moved"


@pytest.mark.parametrize("bits", [1, 4, 6])
def test_learnt_points_at_even_distances_are_the_same_grid(bits: int) -> None:
    weights = bell(600)
    group = Group(DiffQuant(2**bits), group_of(weights).sites)
    group.scheme.fit(group, None)
    values = Uniform(bits=bits).grid.expand().ravel() * float(weights.max() - weights.min()) + float(weights.min())
    group.set_codebook(torch.from_numpy(values), learnt=True)
    torch.testing.assert_close(weight_of(group).detach(), rounded(weights, bits=bits, bucket=600), atol=1e-7, rtol=0)


def test_the_gradient_is_the_latent_weights_own() -> None:
    group, gradient = group_of(bell(600)), torch.randn(600)
    weight_of(group).backward(gradient)
    found = group.master_weight(group.sites[0]).grad
    assert found is not None
    assert torch.equal(found.reshape(-1), gradient)


def test_scale_and_offset_follow_the_latent_weights() -> None:
    group = group_of(bell(600))
    with torch.no_grad():
        group.master_weight(group.sites[0]).mul_(3).add_(1)
    assert torch.equal(weight_of(group).detach(), rounded(bell(600) * 3 + 1))


@pytest.mark.parametrize("settings", [{}, {"sparsity": 0.5}])
def test_trains_and_is_stored_in_buckets(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, inputs = nn.Linear(40, 20), torch.randn(256, 40)
    wanted = nn.Linear(40, 20)(inputs).detach()
    job = Compressor(model, Policy([Rule("*", scheme="uniform", bits=3, **settings)]), teacher=None).prepare()
    start = float((job.model(inputs) - wanted).detach().square().mean())
    opt = torch.optim.AdamW(job.param_groups(lr=0.01))
    job.attach(opt, 100)
    for _ in range(100):
        opt.zero_grad()
        (job.model(inputs) - wanted).square().mean().backward()
        opt.step()
    assert float((job.model(inputs) - wanted).detach().square().mean()) < start / 2
    with PackedFile.from_bytes(job.finish().to_bytes()) as file:
        shared, (grid,) = file.shared("weight"), file.books
        assert (shared.block, shared.groups) == (256, 4)
        np.testing.assert_allclose(grid.expand().ravel(), np.arange(8) / 7, rtol=1e-7)


def test_settings() -> None:
    assert make_scheme("uniform", {"bits": 3, "bucket": 64}) == Uniform(bits=3, bucket=64)
    assert Uniform().stored_values(257) == 2 * 2
    for settings in ({"bits": 0}, {"bits": 17}, {"bucket": 0}):
        with pytest.raises(PolicyError, match=next(iter(settings))):
            make_scheme("uniform", settings)
