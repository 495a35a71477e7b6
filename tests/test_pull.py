"""The pull to the nearest codewords, against the regulariser written out, and where weights are hard."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from compressor.pull import pull


def in_full(latent: Tensor, codebook: Tensor, zero_below: float) -> Tensor:
    """The regulariser over all codewords, by stock operations."""
    distance = (latent[:, None] - codebook).abs() / latent.abs()[:, None]
    near = (codebook == 0) & (latent.abs()[:, None] < zero_below)
    distance = torch.where(near, 0.0, distance)
    return (torch.softmax(-distance / 0.05, 1) * distance).sum()


def test_pull_is_the_regulariser_of_two_codewords() -> None:
    torch.manual_seed(0)
    codebook = torch.tensor([-0.5, 0.75])
    latent = (torch.randn(500, dtype=torch.float64)).requires_grad_()
    free = torch.rand(500) < 0.5
    (expected,) = torch.autograd.grad(in_full(latent[free], codebook.double(), 0.1), latent)
    (found,) = torch.autograd.grad(pull(latent, free, codebook, 0.1), latent)
    inside = ((latent > -0.5) & (latent < 0.75)).detach()
    torch.testing.assert_close(found[inside], expected[inside], rtol=1e-5, atol=1e-9)
    assert (found[~free] == 0).all()


def test_pull_is_close_to_the_sum_over_all_codewords() -> None:
    torch.manual_seed(0)
    codebook = torch.tensor([-2.0, -1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 2.0])
    latent = torch.randn(2000, dtype=torch.float64).requires_grad_()
    everything = torch.ones(2000, dtype=torch.bool)
    full, found = in_full(latent, codebook.double(), 0.1), pull(latent, everything, codebook, 0.1)
    assert float(found.detach()) == pytest.approx(float(full.detach()), rel=0.05)
    one, other = (torch.autograd.grad(term, latent)[0] for term in (full, found))
    assert float(functional.cosine_similarity(one, other, dim=0)) > 0.95


def test_pull_draws_to_the_nearest() -> None:
    latent = torch.tensor([0.9, 1.1, 0.02, -0.6], requires_grad=True)
    pull(latent, torch.ones(4, dtype=torch.bool), torch.tensor([-0.5, 0.0, 1.0]), 0.05).backward()
    assert latent.grad is not None
    assert latent.grad.sign().tolist() == [-1, 1, 0, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("zero_below", [0.0, 0.1])
def test_pull_is_finite_anywhere(dtype: torch.dtype, zero_below: float) -> None:
    sizes = torch.tensor([0.0, 1e-45, 1e-38, 6e-8, 1e-4, 1.0, 6e4, 1e38])
    latent = torch.cat([sizes, -sizes]).to(dtype)
    latent = latent[torch.isfinite(latent)].requires_grad_()
    codebook = torch.tensor([-1e38, -1.0, -1e-38, 0.0, 1e-38, 1.0, 1e38])
    total = pull(latent, torch.ones_like(latent, dtype=torch.bool), codebook, zero_below)
    total.backward()
    assert torch.isfinite(total)
    assert latent.grad is not None
    assert torch.isfinite(latent.grad).all()


def test_pull_keeps_one_number_per_weight() -> None:
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    latent = torch.randn(10_000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        pull(latent, torch.ones(10_000, dtype=torch.bool), torch.linspace(-2, 2, 500), 0.01)
    assert kept <= 10_000
