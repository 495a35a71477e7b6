"""The pull to the nearest codewords, against the regulariser written out, and where weights are hard."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from compressor import pull as pulling
from compressor.hashing import Hash
from compressor.pull import pull


@pytest.fixture(params=["machine code", "stock operators"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Pull float32 in each of the two ways."""
    if request.param == "stock operators":
        monkeypatch.setattr(pulling, "on_processor", lambda numbers: False)
    return str(request.param)


def in_full(latent: Tensor, codebook: Tensor, zero_below: float) -> Tensor:
    """The regulariser over all codewords, by stock operations."""
    distance = (latent[:, None] - codebook).abs() / latent.abs()[:, None]
    near = (codebook == 0) & (latent.abs()[:, None] < zero_below)
    distance = torch.where(near, 0.0, distance)
    return (torch.softmax(-distance / 0.05, 1) * distance).sum()


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-5), (torch.float32, 2e-3)])
def test_pull_is_the_regulariser_of_two_codewords(way: str, dtype: torch.dtype, near: float) -> None:
    torch.manual_seed(0)
    codebook = torch.tensor([-0.5, 0.75])
    latent = torch.randn(500, dtype=dtype).requires_grad_()
    free = torch.rand(500) < 0.5
    (expected,) = torch.autograd.grad(in_full(latent.double()[free], codebook.double(), 0.1), latent)
    (found,) = torch.autograd.grad(pull(latent, free, codebook, 0.1), latent)
    inside = ((latent > -0.5) & (latent < 0.75)).detach()
    torch.testing.assert_close(found[inside], expected[inside], rtol=near, atol=near**2)
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


def test_pull_draws_to_the_nearest(way: str) -> None:
    latent = torch.tensor([0.9, 1.1, 0.02, -0.02, -0.6], requires_grad=True)
    pull(latent, torch.ones(5, dtype=torch.bool), torch.tensor([-0.5, 0.0, 1.0]), 0.05).backward()
    assert latent.grad is not None
    assert latent.grad.sign().tolist() == [-1, 1, 0, 0, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("zero_below", [0.0, 0.1])
def test_pull_is_finite_anywhere(way: str, dtype: torch.dtype, zero_below: float) -> None:
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


sizes = st.floats(2.0**-5, 2.0**5, width=32)
weights = st.builds(lambda size, sign: sign * size, sizes, st.sampled_from([-1, 1]))


@given(
    arrays(np.float32, st.integers(0, 60), elements=weights),
    st.lists(weights | st.just(0.0), min_size=2, max_size=40, unique=True),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=300, deadline=None)
def test_machine_code_computes_what_operators_do(
    numbers: NDArray[np.float32], book: list[float], zero_below: float, seed: int
) -> None:
    latent, codebook = torch.from_numpy(numbers), torch.tensor(book).sort().values
    free = torch.rand(len(latent), generator=torch.Generator().manual_seed(seed)) < 0.7
    total, slope = pulling._in_machine_code(latent, free, codebook, Hash(codebook), zero_below)
    exact, wide = latent.double(), codebook.double()
    expected, wanted = pulling._by_operators(exact, free, wide, Hash(wide), zero_below)
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-6)
    steepest = codebook.abs().max() / latent.square()  # of the two codewords, whose slopes may cancel
    assert ((slope - wanted).abs() <= 1e-3 * wanted.abs() + 1e-2 * steepest).all()
    assert (slope[~free] == 0).all()


def test_machine_code_writes_within_its_bounds() -> None:
    latent, codebook = torch.randn(1_000), torch.linspace(-1, 1, 7)
    held = torch.full((1_032,), 7.0)
    held[16:-16] = latent
    total, slope = pulling._in_machine_code(
        held[16:-16], torch.ones(1_000, dtype=torch.bool), codebook, Hash(codebook), 0.1
    )
    assert slope.shape == latent.shape
    assert torch.isfinite(total)
    assert (held[:16] == 7).all()
    assert (held[-16:] == 7).all()
