"""The hash and the sums as machine code and with stock operators, and both against slow obvious twins."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from compressor.ops import gather_scatter, parallel
from compressor.ops import nearest as nearest_ops
from compressor.ops.gather_scatter import (
    frozen_lookup,
    straight_through,
    sum_by_index,
    write_codewords,
    zero_where_assigned,
)
from compressor.ops.nearest import NearestCodeword, nearest, nearest_by_row
from compressor.ops.parallel import CHUNK, cache_chunks

SIZES = (0, 1, 3, 4, 5, CHUNK - 1, CHUNK + 3)
KINDS = torch.uint8, torch.int32
anything = st.floats(width=32, allow_nan=False)
finite = st.floats(-(2.0**127), 2.0**127, width=32)  # so that no bound between two is infinite


@pytest.fixture(params=["machine code", "two threads", "stock operators"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Compute in each of the ways."""
    if request.param == "two threads":
        request.getfixturevalue("two_threads")
    if request.param == "stock operators":
        monkeypatch.setattr(nearest_ops, "available", lambda: False)
        monkeypatch.setattr(gather_scatter, "compiled_kernel", lambda *given, **settings: None)
    return str(request.param)


def hashed(weights: Tensor, codebook: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Hash between items that must stay as they are."""
    indices = torch.full((len(weights) + 16,), 77, dtype=kind)
    values = torch.full((len(weights) + 16,), 77.0)
    NearestCodeword(codebook)(weights, indices[8:-8], values[8:-8])
    for held in (indices, values):
        assert (held[:8] == 77).all()
        assert (held[-8:] == 77).all()
    return indices[8:-8], values[8:-8]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("codewords", [1, 2, 3, 4, 5, 8, 9, 16, 17, 256])
@pytest.mark.parametrize("size", SIZES)
def test_the_hash_is_the_number_of_bounds_below(way: str, size: int, codewords: int, kind: torch.dtype) -> None:
    torch.manual_seed(size + codewords)
    codebook = torch.randn(codewords).sort().values
    bounds = (codebook[1:] + codebook[:-1]) / 2
    weights = torch.cat([torch.randn(size), codebook, bounds])[:size]
    indices, values = hashed(weights, codebook, kind)
    expected = torch.bucketize(weights, bounds)
    assert torch.equal(indices.long(), expected)
    assert torch.equal(values, codebook[expected])


@given(
    arrays(np.float32, st.integers(1, 40), elements=anything), arrays(np.float32, st.integers(1, 300), elements=finite)
)
@settings(max_examples=300, deadline=None)
@example(np.array([-1.0], np.float32), np.array([0.0, -0.0, -0.0], np.float32))
def test_the_machine_code_hashes_any_weights_by_any_codebook(weights: np.ndarray, codebook: np.ndarray) -> None:
    """Also by one that spans more than a float can say, repeats itself, or crowds in a cell; and infinite weights."""
    ascending = torch.from_numpy(np.sort(codebook))
    bounds = (ascending[1:] + ascending[:-1]) / 2
    indices, values = hashed(torch.from_numpy(weights), ascending, torch.int32)
    expected = torch.tensor([int((bounds < float(weight)).sum()) for weight in weights])
    assert torch.equal(indices.long(), expected)
    assert torch.equal(values, ascending[expected])


def test_a_weight_that_is_no_number_stays_within_the_codebook() -> None:
    indices, values = hashed(torch.full((5,), torch.nan), torch.tensor([1.0, 2.0, 3.0]), torch.uint8)
    assert indices.tolist() == [0] * 5
    assert values.tolist() == [1.0] * 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_sums_by_index(way: str, size: int, kind: torch.dtype) -> None:
    torch.manual_seed(size)
    terms, indices = torch.randn(size), torch.randint(0, 200, (size,)).to(kind)
    expected = np.bincount(indices.numpy(), terms.double().numpy(), 200)
    np.testing.assert_allclose(sum_by_index(terms, indices, 200).numpy(), expected, atol=1e-4)


def test_what_does_not_lie_together(way: str) -> None:
    """A gradient may be one number that stands for all, as that of a sum is, or a column of a larger one."""
    codebook = torch.tensor([-1.0, 0.0, 1.0], requires_grad=True)
    wide = torch.randn(600, 2)
    indices, values = hashed(wide[:, 1], codebook, torch.uint8)
    assert torch.equal(indices.int(), torch.bucketize(wide[:, 1].clone(), torch.tensor([-0.5, 0.5]), out_int32=True))
    assert torch.equal(values, codebook[indices.int()])
    counts = torch.bincount(indices, minlength=3).float()
    assert torch.equal(sum_by_index(torch.ones(1).expand(600), indices, 3), counts)
    assert torch.equal(sum_by_index(torch.tensor([[1.0, 7.0]]).repeat(600, 1)[:, 0], indices, 3), counts)
    straight_through(wide, codebook).sum().backward()
    assert codebook.grad is not None
    assert float(codebook.grad.sum()) == 1200


def test_sums_of_large_and_small_are_exact() -> None:
    terms = torch.tensor([1e8, 1.0, 1.0, -1e8] * 1001)
    assert sum_by_index(terms, torch.zeros(4004, dtype=torch.uint8), 1).tolist() == [2002.0]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (CHUNK + 3,)])
def test_what_is_fixed_and_what_is_free(way: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights, codebook, indices = torch.randn(shape), torch.randn(7), torch.randint(-1, 7, shape, dtype=dtype)
    expected = torch.where(indices < 0, weights, codebook[indices.long().clamp(min=0)])
    turned = weights.clone().t() if len(shape) == 2 else weights.clone()
    write_codewords(turned, codebook, indices.t() if len(shape) == 2 else indices)
    assert torch.equal(turned.t() if len(shape) == 2 else turned, expected), "of any strides"
    write_codewords(weights, codebook, indices)
    assert torch.equal(weights, expected)
    gradient = torch.randn(shape)
    expected = torch.where(indices < 0, gradient, 0.0)
    out = torch.empty(shape)
    zero_where_assigned(gradient, indices.t().contiguous().t() if len(shape) == 2 else indices, out)
    assert torch.equal(out, expected)


def test_unsigned_indices_are_never_free(way: str) -> None:
    codebook, indices = torch.randn(256), torch.arange(256, dtype=torch.uint8)
    write_codewords(weights := torch.zeros(256), codebook, indices)
    assert torch.equal(weights, codebook)


def test_only_what_is_free_has_a_gradient(way: str) -> None:
    master = torch.randn(4, 6).requires_grad_()
    indices = torch.randint(-1, 3, (4, 6), dtype=torch.int32)
    gradient = torch.randn(4, 6)
    frozen_lookup(master, torch.tensor([-1.0, 0.0, 1.0]), indices).backward(gradient)
    assert master.grad is not None
    assert torch.equal(master.grad, torch.where(indices < 0, gradient, 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_settle_unseen_by_autograd(way: str, dtype: torch.dtype) -> None:
    """Two forward passes before a backward pass: the second must not spoil what the first has saved."""
    master = torch.tensor([0.4, 0.9], dtype=dtype, requires_grad=True)
    given_ = torch.tensor([0.0, 2.0]), torch.tensor([-1, 1], dtype=torch.int32)
    first, second = (frozen_lookup(master, *given_).square().sum() for _ in range(2))
    (first + second).backward()
    assert master.grad is not None
    assert torch.equal(master.grad, 4 * master.detach() * torch.tensor([1, 0]))
    assert master.detach()[1] == 2, "what drifted is put back"


def test_elsewhere_than_on_a_processor_runs_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU would spend its time on launches: resnet50's layers are 780 runs of a processor's length."""
    assert len(list(cache_chunks(torch.empty(25_000_000, device="meta")))) == 24
    assert [run.start for run in cache_chunks(torch.empty(2 * CHUNK + 1))] == [0, CHUNK, 2 * CHUNK]
    weights, codebook = torch.randn(3, 1000), torch.tensor([-1.0, 0.0, 1.0])
    expected = nearest(weights, codebook)
    monkeypatch.setattr(parallel, "CHUNK", 7)
    assert torch.equal(nearest(weights, codebook), expected)
    assert nearest(torch.empty(0, 3), codebook).shape == (0, 3)


def test_other_numbers_take_the_stock_operators() -> None:
    codebook = torch.tensor([-1.0, 0.0, 1.0])
    weights = torch.tensor([-0.9, 0.4, 0.6])
    indices, values = hashed(weights.bfloat16(), codebook, torch.uint8)
    assert (indices.tolist(), values.tolist()) == ([0, 1, 2], [-1.0, 0.0, 1.0])
    assert sum_by_index(weights.double(), indices, 3).dtype == torch.float64
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert nearest(weights, codebook.to(dtype)).tolist() == [0, 1, 2]
        assert nearest(weights.to(dtype), codebook).tolist() == [0, 1, 2]


@given(st.integers(1, 5), st.integers(1, 7), st.integers(0, 6), st.integers(1, 5), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_each_row_by_its_own_codebook(rows: int, row: int, missing: int, codewords: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    weights = torch.randn(max(rows * row - missing % row, 1), generator=random)
    codebooks = torch.randn(rows, codewords, generator=random).sort(1).values
    found = nearest_by_row(weights, codebooks, row)
    for at, (weight, position) in enumerate(zip(weights, found, strict=True)):
        own = codebooks[at // row]
        assert int(position) == at // row * codewords + int((own - weight).abs().argmin())
