"""The pull to the nearest codewords, against the regulariser written out, and where weights are hard."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from compressor.ops import relative_distance as pulling
from compressor.ops.gather_scatter import fixed
from compressor.ops.relative_distance import fixed_and_pulled, pull
from compressor.ops.relative_distance_kernel import FEW, RUN, Onto, in_machine_code


@pytest.fixture(params=["machine code", "two threads", "stock operators"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Pull float32 in each of the ways."""
    if request.param == "two threads":
        request.getfixturevalue("two_threads")
    if request.param == "stock operators":
        monkeypatch.setattr(pulling, "in_machine_code", lambda *given: None)
    return str(request.param)


def chosen(free: Tensor) -> Tensor:
    """Give indices by which these weights are free."""
    return torch.where(free, -1, 0).to(torch.int16)


def all_free(count: int) -> Tensor:
    """Give indices by which all weights are."""
    return torch.full((count,), -1, dtype=torch.int8)


def slopes_of(latent: Tensor, codebook: Tensor, indices: Tensor, factor: float = 1.0) -> Tensor:
    """Give the gradient of the pull, of the dtype of ``latent``."""
    drawn = fixed_and_pulled(latent, codebook, indices, 0.1, nothing())[1]
    (found,) = torch.autograd.grad(drawn, latent, torch.tensor(factor).double())
    return found


def nothing() -> Tensor:
    """Give room for what a pull finds."""
    return torch.zeros(2, dtype=torch.float64)


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
    found = slopes_of(latent, codebook, chosen(free))
    inside = ((latent > -0.5) & (latent < 0.75)).detach()
    torch.testing.assert_close(found[inside], expected[inside], rtol=near, atol=near**2)
    assert (found[~free] == 0).all()


def test_pull_is_close_to_the_sum_over_all_codewords() -> None:
    torch.manual_seed(0)
    codebook = torch.tensor([-2.0, -1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 2.0])
    latent = torch.randn(2000, dtype=torch.float64).requires_grad_()
    full, (found, count) = in_full(latent, codebook.double(), 0.1), pull(latent, codebook, all_free(2000), 0.1)
    assert count == 2000
    assert float(found) == pytest.approx(float(full.detach()), rel=0.05)
    one, other = torch.autograd.grad(full, latent)[0], slopes_of(latent, codebook, all_free(2000))
    assert float(functional.cosine_similarity(one, other, dim=0)) > 0.95


def test_pull_draws_to_the_nearest(way: str) -> None:
    latent = torch.tensor([0.9, 1.1, 0.02, -0.02, -0.6], requires_grad=True)
    assert slopes_of(latent, torch.tensor([-0.5, 0.0, 1.0]), all_free(5)).sign().tolist() == [-1, 1, 0, 0, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("zero_below", [0.0, 0.1])
def test_pull_is_finite_anywhere(way: str, dtype: torch.dtype, zero_below: float) -> None:
    sizes = torch.tensor([0.0, 1e-45, 1e-38, 6e-8, 1e-4, 1.0, 6e4, 1e38])
    latent = torch.cat([sizes, -sizes]).to(dtype)
    latent = latent[torch.isfinite(latent)].requires_grad_()
    codebook = torch.tensor([-1e38, -1.0, -1e-38, 0.0, 1e-38, 1.0, 1e38])
    fixed_and_pulled(latent, codebook, all_free(len(latent)), zero_below, found := nothing())[1].backward()
    assert torch.equal(found, pull(latent, codebook, all_free(len(latent)), zero_below))
    assert torch.isfinite(found).all()
    assert latent.grad is not None
    assert torch.isfinite(latent.grad).all()


def test_pull_keeps_nothing_of_its_own_for_the_backward_pass(way: str) -> None:
    latent, indices = torch.randn(10_000, requires_grad=True), all_free(10_000)
    _, drawn = fixed_and_pulled(latent, torch.linspace(-2, 2, 500), indices, 0.01, nothing())
    node: Any = drawn.grad_fn
    known = {latent.data_ptr(), indices.data_ptr()}
    held = [value for value in node.given if isinstance(value, Tensor)]
    assert not node.saved_tensors
    assert sum(tensor.numel() for tensor in held if tensor.data_ptr() not in known) == 500


def test_weights_and_pull_have_one_gradient(way: str) -> None:
    """Together, one after the other, and each alone: what the two separately have."""
    torch.manual_seed(0)
    latent, codebook = torch.randn(70, 100, requires_grad=True), torch.linspace(-1, 1, 7).flip(0)
    indices, given_ = chosen(torch.rand(70, 100) < 0.5), torch.randn(70, 100)
    (of_weight,) = torch.autograd.grad(fixed(latent, codebook, indices), latent, given_)
    of_pull = slopes_of(latent, codebook, indices)
    weight, drawn = fixed_and_pulled(latent, codebook, indices, torch.tensor(0.1), found := nothing())
    assert torch.equal(weight, fixed(latent, codebook, indices))
    assert drawn == 0
    assert found.tolist() == [0, 0], "nothing is worked out before the backward pass"
    ((weight * given_).sum() + 0.5 * drawn).backward()
    assert torch.equal(found, pull(latent, codebook, indices, 0.1))
    assert found[1] == (indices < 0).sum()
    assert latent.grad is not None
    torch.testing.assert_close(latent.grad, of_weight + 0.5 * of_pull)
    weight, drawn = fixed_and_pulled(latent, codebook, indices, 0.1, nothing())
    (first,) = torch.autograd.grad(weight, latent, given_)
    (second,) = torch.autograd.grad(drawn, latent)
    assert torch.equal(first, of_weight)
    assert torch.equal(second, of_pull)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_have_one_gradient_too(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    latent, codebook = torch.randn(300, dtype=dtype).requires_grad_(), torch.linspace(-1, 1, 7)
    free = torch.rand(300) < 0.5
    weight, drawn = fixed_and_pulled(latent, codebook, chosen(free), 0.1, nothing())
    (weight.float().sum() + 0.01 * drawn).backward()
    slopes = slopes_of(latent, codebook, chosen(free), 0.01)
    assert weight.dtype == dtype
    assert latent.grad is not None
    torch.testing.assert_close(latent.grad, free.to(dtype) + slopes)


sizes = st.floats(2.0**-5, 2.0**5, width=32)
weights = st.builds(lambda size, sign: sign * size, sizes, st.sampled_from([-1, 1]))


@given(
    arrays(np.float32, st.integers(0, 60), elements=weights),
    st.lists(weights | st.just(0.0), min_size=1, max_size=40, unique=True),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.sampled_from([torch.int8, torch.int16, torch.int32]),
    st.sampled_from([0.05, 0.7]),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=300, deadline=None)
def test_machine_code_computes_what_operators_do(
    numbers: NDArray[np.float32], book: list[float], zero_below: float, kind: torch.dtype, share: float, seed: int
) -> None:
    latent, codebook = torch.from_numpy(numbers), torch.tensor(book).sort().values
    random = torch.rand(len(latent), generator=torch.Generator().manual_seed(seed))
    free, fixed_to = random < share, (random * len(codebook)).to(kind)
    indices = torch.where(free, torch.tensor(-1, dtype=kind), fixed_to)
    slope, wanted = torch.zeros(2, len(latent))
    found = in_machine_code(latent, indices, codebook, zero_below, Onto(0.5, slope))
    assert found is not None
    total, count = found
    exact = latent.double(), indices, codebook.double(), zero_below, Onto(0.5, wanted)
    expected, _ = pulling._by_operators(*exact)
    assert count == int(free.sum())
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-6)
    steepest = codebook.abs().max() / latent.square()  # of the two codewords, whose slopes may cancel
    assert ((slope - wanted).abs() <= 1e-3 * wanted.abs() + 1e-2 * steepest).all()
    assert (slope[~free] == 0).all()


@pytest.mark.parametrize("codewords", [1, *FEW, FEW[-1] + 2])
@pytest.mark.parametrize("count", [0, 1, RUN - 1, RUN, 2 * RUN + 5])
def test_runs_are_all_of_the_weights(way: str, count: int, codewords: int) -> None:
    torch.manual_seed(0)
    latent, codebook, free = torch.randn(count), torch.linspace(-1, 1, codewords), torch.rand(count) < 0.5
    latent.requires_grad_()
    total, number = pull(latent, codebook, chosen(free), 0.1)
    parts = [
        pull(one[None], codebook, chosen(is_free[None]), 0.1)[0] for one, is_free in zip(latent, free, strict=True)
    ]
    assert number == int(free.sum())
    assert float(total) == pytest.approx(sum(float(part) for part in parts), rel=1e-5)
    assert torch.equal(slopes_of(latent, codebook, chosen(free)) != 0, free)


def test_what_is_no_number_is_seen(way: str) -> None:
    """Training has to hear of a weight that went astray."""
    for lost in (float("nan"), float("inf")):
        latent = torch.tensor([1.0, lost, -1.0])
        assert pull(latent, torch.tensor([-1.0, 0.0, 1.0]), all_free(3), 0.1)[0].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_dtype_changes_nothing(way: str, dtype: torch.dtype) -> None:
    latent = torch.randn(5_000, requires_grad=True)
    given_ = latent, torch.linspace(-1, 1, 7), all_free(5_000)
    indices = chosen(torch.rand(5_000) < 0.5)
    wanted = slopes_of(*given_)
    torch.set_default_dtype(dtype)
    try:
        found = slopes_of(*given_)
        merged = fixed(latent.detach().clone(), given_[1].to(dtype), indices)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, wanted)
    assert torch.equal(merged, torch.where(indices < 0, latent, given_[1].to(dtype).float()[0]))


def test_machine_code_writes_within_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it writes is surrounded by bytes that have to stay as they are."""
    held: list[NDArray[Any]] = []

    def guarded(shape: tuple[int, ...], dtype: Any = np.float64) -> NDArray[Any]:
        held.append(np.full(int(np.prod(shape)) + 64, 7, dtype))
        return held[-1][32:-32].reshape(shape)

    latent, codebook = torch.randn(2 * RUN + 5), torch.linspace(-1, 1, 7)
    slopes = torch.from_numpy(guarded((len(latent),), np.float32))
    with monkeypatch.context() as patch:
        patch.setattr("numpy.empty", guarded)
        found = in_machine_code(latent, all_free(len(latent)), codebook, 0.1, Onto(1.0, slopes.zero_()))
    assert found is not None
    assert torch.isfinite(slopes).all()
    assert len(held) == 2
    for memory in held:
        assert (memory[:32] == 7).all()
        assert (memory[-32:] == 7).all()
