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

from compressor.ops import relative_distance as distance_ops
from compressor.ops.gather_scatter import frozen_lookup
from compressor.ops.relative_distance import frozen_lookup_with_distance, relative_distance
from compressor.ops.relative_distance_kernel import CHUNK, FEW_CODEWORDS, GradAccumulator, run_kernel


@pytest.fixture(params=["machine code", "two threads", "stock operators"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Pull float32 in each of the ways."""
    if request.param == "two threads":
        request.getfixturevalue("two_threads")
    if request.param == "stock operators":
        monkeypatch.setattr(distance_ops, "run_kernel", lambda *given: None)
    return str(request.param)


def chosen(free: Tensor) -> Tensor:
    """Returns indices by which these weights are free."""
    return torch.where(free, -1, 0).to(torch.int16)


def all_free(count: int) -> Tensor:
    """Returns indices by which all weights are."""
    return torch.full((count,), -1, dtype=torch.int8)


def slopes_of(master: Tensor, codebook: Tensor, indices: Tensor, factor: float = 1.0) -> Tensor:
    """Returns the gradient of the relative distance, of the dtype of ``master``."""
    drawn = frozen_lookup_with_distance(master, codebook, indices, 0.1, nothing())[1]
    (found,) = torch.autograd.grad(drawn, master, torch.tensor(factor).double())
    return found


def nothing() -> Tensor:
    """Returns the buffer that takes the distance and the count."""
    return torch.zeros(2, dtype=torch.float64)


def in_full(master: Tensor, codebook: Tensor, zero_below: float) -> Tensor:
    """The regulariser over all codewords, by stock operations."""
    distance = (master[:, None] - codebook).abs() / master.abs()[:, None]
    near = (codebook == 0) & (master.abs()[:, None] < zero_below)
    distance = torch.where(near, 0.0, distance)
    return (torch.softmax(-distance / 0.05, 1) * distance).sum()


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-5), (torch.float32, 2e-3)])
def test_pull_is_the_regulariser_of_two_codewords(way: str, dtype: torch.dtype, near: float) -> None:
    torch.manual_seed(0)
    codebook = torch.tensor([-0.5, 0.75])
    master = torch.randn(500, dtype=dtype).requires_grad_()
    free = torch.rand(500) < 0.5
    (expected,) = torch.autograd.grad(in_full(master.double()[free], codebook.double(), 0.1), master)
    found = slopes_of(master, codebook, chosen(free))
    inside = ((master > -0.5) & (master < 0.75)).detach()
    torch.testing.assert_close(found[inside], expected[inside], rtol=near, atol=near**2)
    assert (found[~free] == 0).all()


def test_pull_is_close_to_the_sum_over_all_codewords() -> None:
    torch.manual_seed(0)
    codebook = torch.tensor([-2.0, -1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 2.0])
    master = torch.randn(2000, dtype=torch.float64).requires_grad_()
    full, (found, count) = (
        in_full(master, codebook.double(), 0.1),
        relative_distance(master, codebook, all_free(2000), 0.1),
    )
    assert count == 2000
    assert float(found) == pytest.approx(float(full.detach()), rel=0.05)
    one, other = torch.autograd.grad(full, master)[0], slopes_of(master, codebook, all_free(2000))
    assert float(functional.cosine_similarity(one, other, dim=0)) > 0.95


def test_pull_draws_to_the_nearest(way: str) -> None:
    master = torch.tensor([0.9, 1.1, 0.02, -0.02, -0.6], requires_grad=True)
    assert slopes_of(master, torch.tensor([-0.5, 0.0, 1.0]), all_free(5)).sign().tolist() == [-1, 1, 0, 0, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("zero_below", [0.0, 0.1])
def test_pull_is_finite_anywhere(way: str, dtype: torch.dtype, zero_below: float) -> None:
    sizes = torch.tensor([0.0, 1e-45, 1e-38, 6e-8, 1e-4, 1.0, 6e4, 1e38])
    master = torch.cat([sizes, -sizes]).to(dtype)
    master = master[torch.isfinite(master)].requires_grad_()
    codebook = torch.tensor([-1e38, -1.0, -1e-38, 0.0, 1e-38, 1.0, 1e38])
    frozen_lookup_with_distance(master, codebook, all_free(len(master)), zero_below, found := nothing())[1].backward()
    assert torch.equal(found, relative_distance(master, codebook, all_free(len(master)), zero_below))
    assert torch.isfinite(found).all()
    assert master.grad is not None
    assert torch.isfinite(master.grad).all()


def test_pull_keeps_nothing_of_its_own_for_the_backward_pass(way: str) -> None:
    master, indices = torch.randn(10_000, requires_grad=True), all_free(10_000)
    _, drawn = frozen_lookup_with_distance(master, torch.linspace(-2, 2, 500), indices, 0.01, nothing())
    node: Any = drawn.grad_fn
    known = {master.data_ptr(), indices.data_ptr()}
    held = [value for value in node.inputs if isinstance(value, Tensor)]
    assert not node.saved_tensors
    assert sum(tensor.numel() for tensor in held if tensor.data_ptr() not in known) == 500


def test_weights_and_pull_have_one_gradient(way: str) -> None:
    """Together, one after the other, and each alone: what the two separately have."""
    torch.manual_seed(0)
    master, codebook = torch.randn(70, 100, requires_grad=True), torch.linspace(-1, 1, 7).flip(0)
    indices, given_ = chosen(torch.rand(70, 100) < 0.5), torch.randn(70, 100)
    (of_weight,) = torch.autograd.grad(frozen_lookup(master, codebook, indices), master, given_)
    of_pull = slopes_of(master, codebook, indices)
    weight, drawn = frozen_lookup_with_distance(master, codebook, indices, torch.tensor(0.1), found := nothing())
    assert torch.equal(weight, frozen_lookup(master, codebook, indices))
    assert drawn == 0
    assert found.tolist() == [0, 0], "nothing is worked out before the backward pass"
    ((weight * given_).sum() + 0.5 * drawn).backward()
    assert torch.equal(found, relative_distance(master, codebook, indices, 0.1))
    assert found[1] == (indices < 0).sum()
    assert master.grad is not None
    torch.testing.assert_close(master.grad, of_weight + 0.5 * of_pull)
    weight, drawn = frozen_lookup_with_distance(master, codebook, indices, 0.1, nothing())
    (first,) = torch.autograd.grad(weight, master, given_)
    (second,) = torch.autograd.grad(drawn, master)
    assert torch.equal(first, of_weight)
    assert torch.equal(second, of_pull)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_have_one_gradient_too(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    master, codebook = torch.randn(300, dtype=dtype).requires_grad_(), torch.linspace(-1, 1, 7)
    free = torch.rand(300) < 0.5
    weight, drawn = frozen_lookup_with_distance(master, codebook, chosen(free), 0.1, nothing())
    (weight.float().sum() + 0.01 * drawn).backward()
    slopes = slopes_of(master, codebook, chosen(free), 0.01)
    assert weight.dtype == dtype
    assert master.grad is not None
    torch.testing.assert_close(master.grad, free.to(dtype) + slopes)


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
    master, codebook = torch.from_numpy(numbers), torch.tensor(book).sort().values
    random = torch.rand(len(master), generator=torch.Generator().manual_seed(seed))
    free, fixed_to = random < share, (random * len(codebook)).to(kind)
    indices = torch.where(free, torch.tensor(-1, dtype=kind), fixed_to)
    none, slope, wanted = torch.zeros(3, len(master))
    found = run_kernel(master, indices, codebook, zero_below, GradAccumulator(0.5, none, slope))
    assert found is not None
    total, count = found
    exact = master.double(), indices, codebook.double(), zero_below, GradAccumulator(0.5, none, wanted)
    expected, _ = distance_ops._by_operators(*exact)
    assert count == int(free.sum())
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-6)
    steepest = codebook.abs().max() / master.square()  # of the two codewords, whose slopes may cancel
    assert ((slope - wanted).abs() <= 1e-3 * wanted.abs() + 1e-2 * steepest).all()
    assert (slope[~free] == 0).all()


@pytest.mark.parametrize("codewords", [1, *FEW_CODEWORDS, FEW_CODEWORDS[-1] + 2])
@pytest.mark.parametrize("count", [0, 1, CHUNK - 1, CHUNK, 2 * CHUNK + 5])
def test_runs_are_all_of_the_weights(way: str, count: int, codewords: int) -> None:
    torch.manual_seed(0)
    master, codebook, free = torch.randn(count), torch.linspace(-1, 1, codewords), torch.rand(count) < 0.5
    master.requires_grad_()
    total, number = relative_distance(master, codebook, chosen(free), 0.1)
    parts = [
        relative_distance(one[None], codebook, chosen(is_free[None]), 0.1)[0]
        for one, is_free in zip(master, free, strict=True)
    ]
    assert number == int(free.sum())
    assert float(total) == pytest.approx(sum(float(part) for part in parts), rel=1e-5)
    assert torch.equal(slopes_of(master, codebook, chosen(free)) != 0, free)


def test_what_is_no_number_is_seen(way: str) -> None:
    """Training has to hear of a weight that went astray."""
    for lost in (float("nan"), float("inf")):
        master = torch.tensor([1.0, lost, -1.0])
        assert relative_distance(master, torch.tensor([-1.0, 0.0, 1.0]), all_free(3), 0.1)[0].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_dtype_changes_nothing(way: str, dtype: torch.dtype) -> None:
    master = torch.randn(5_000, requires_grad=True)
    given_ = master, torch.linspace(-1, 1, 7), all_free(5_000)
    indices = chosen(torch.rand(5_000) < 0.5)
    wanted = slopes_of(*given_)
    torch.set_default_dtype(dtype)
    try:
        found = slopes_of(*given_)
        merged = frozen_lookup(master.detach().clone(), given_[1].to(dtype), indices)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, wanted)
    assert torch.equal(merged, torch.where(indices < 0, master, given_[1].to(dtype).float()[0]))


def test_machine_code_writes_within_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it writes is surrounded by bytes that have to stay as they are."""
    held: list[NDArray[Any]] = []

    def guarded(shape: tuple[int, ...], dtype: Any = np.float64) -> NDArray[Any]:
        held.append(np.full(int(np.prod(shape)) + 64, 7, dtype))
        return held[-1][32:-32].reshape(shape)

    master, codebook = torch.randn(2 * CHUNK + 5), torch.linspace(-1, 1, 7)
    slopes = torch.from_numpy(guarded((len(master),), np.float32))
    with monkeypatch.context() as patch:
        patch.setattr("numpy.empty", guarded)
        accumulator = GradAccumulator(1.0, torch.zeros(len(master)), slopes)
        found = run_kernel(master, all_free(len(master)), codebook, 0.1, accumulator)
    assert found is not None
    assert torch.isfinite(slopes).all()
    assert len(held) == 2
    for memory in held:
        assert (memory[:32] == 7).all()
        assert (memory[-32:] == 7).all()
