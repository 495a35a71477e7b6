"""Gather, scatter and nearest codeword against slow obvious twins."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from compressor.ops.gather_scatter import lookup, straight_through, sum_by_index
from compressor.ops.nearest import nearest

finite = st.floats(-(2.0**99), 2.0**99, width=32)


def slow_nearest(weights: Tensor, codebook: Tensor) -> Tensor:
    bounds = (codebook[1:] + codebook[:-1]) / 2
    return torch.stack([(bounds < w).sum() for w in weights.reshape(-1)]).reshape(weights.shape).int()


@given(arrays(np.float32, st.integers(1, 60), elements=finite), arrays(np.float32, st.integers(1, 40), elements=finite))
@settings(max_examples=200, deadline=None)
def test_nearest_is_the_number_of_bounds_below(weights: np.ndarray, codebook: np.ndarray) -> None:
    ascending = torch.from_numpy(np.unique(codebook))
    given_weights = torch.from_numpy(weights)
    assert torch.equal(nearest(given_weights, ascending), slow_nearest(given_weights, ascending))


@pytest.mark.parametrize("codewords", [1, 2, 3, 16, 200, 1024, 5000])
def test_nearest_agrees_with_bucketize_on_many_weights(codewords: int) -> None:
    torch.manual_seed(codewords)
    weights, codebook = torch.randn(3, 70_001), torch.randn(codewords).sort().values
    bounds = (codebook[1:] + codebook[:-1]) / 2
    on_bounds = torch.cat([weights.reshape(-1), bounds, codebook])
    assert torch.equal(nearest(on_bounds, codebook), torch.bucketize(on_bounds, bounds, out_int32=True))


def test_nearest_where_bounds_crowd_in_one_cell() -> None:
    codebook = torch.tensor([0.0, 1e-6, 2e-6, 1.0, 2.0])
    weights = torch.linspace(-1e-6, 3e-6, 101)
    assert torch.equal(nearest(weights, codebook), slow_nearest(weights, codebook))


def test_lookup_gradient_is_the_weighted_bincount() -> None:
    torch.manual_seed(0)
    codebook = torch.randn(5, dtype=torch.float64, requires_grad=True)
    indices = torch.randint(5, (7, 11), dtype=torch.int32)
    gradient = torch.randn(7, 11, dtype=torch.float64)
    lookup(codebook, indices).backward(gradient)
    expected = np.bincount(indices.reshape(-1).numpy(), gradient.reshape(-1).numpy(), 5)
    assert codebook.grad is not None
    np.testing.assert_allclose(codebook.grad.numpy(), expected, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda c: lookup(c, indices), codebook)


def test_straight_through_gives_both_gradients() -> None:
    master = torch.randn(6, requires_grad=True)
    codebook = torch.tensor([-1.0, 1.0], requires_grad=True)
    gradient = torch.arange(6.0)
    indices = nearest(master.detach(), codebook.detach())
    straight_through(master, codebook, indices).backward(gradient)
    assert master.grad is not None
    assert codebook.grad is not None
    assert torch.equal(master.grad, gradient)
    assert codebook.grad.tolist() == [float(gradient[indices == k].sum()) for k in (0, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("codewords", [1, 2, 16, 300])
def test_straight_through_finds_the_nearest_itself(codewords: int, dtype: torch.dtype) -> None:
    torch.manual_seed(codewords)
    master = torch.randn(3, 70_001).to(dtype).t().requires_grad_()
    codebook = torch.randn(codewords).sort().values.requires_grad_()
    gradient = torch.randn(70_001, 3)
    found = straight_through(master, codebook)
    told = straight_through(master, codebook, nearest(master.detach().float(), codebook.detach()))
    assert torch.equal(found, told)
    to_both = [torch.autograd.grad(weight, (master, codebook), gradient) for weight in (found, told)]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*to_both, strict=True))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_gradients_of_a_codebook_whatever_the_indices_are(dtype: torch.dtype) -> None:
    """Of any dtype, and apart in memory; of a sum, whose gradient is one number seen as many."""
    torch.manual_seed(0)
    table = torch.randint(7, (50, 3)).to(dtype)
    for indices in (table, table[:, 1], table.t()):
        codebook = torch.randn(7, requires_grad=True)
        values = lookup(codebook, indices)
        assert torch.equal(values, codebook[indices.long()])
        (found,) = torch.autograd.grad(values.sum(), codebook)
        assert torch.equal(found, torch.bincount(indices.reshape(-1).long(), minlength=7).float())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize(
    ("count", "sums"), [(128, [4096, 4160]), (129, [4225, 4160]), (130, [4225, 4290]), (131, [4356, 4290])]
)
def test_no_term_is_left_out_of_sums_taken_four_at_a_time(count: int, sums: list[int], dtype: torch.dtype) -> None:
    """The odd numbers up to 2 n - 1 sum to n n, the even ones up to 2 n to n (n + 1)."""
    terms, indices = torch.arange(1.0, count + 1), (torch.arange(count) % 2).to(dtype)
    assert sum_by_index(terms, indices, 2).tolist() == sums
