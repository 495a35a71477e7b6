"""The nearest codeword of each vector, against a table of all distances."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.ops import nearest_vector as module
from compressor.ops.nearest_vector import nearest_vector


def twin(rows: Tensor, codebook: Tensor) -> list[list[int]]:
    """Vector by vector, the shorter last ones against the beginnings of the codewords."""
    length, found = codebook.shape[1], []
    for row in rows.double():
        vectors = row.split(length)
        errors = [(codebook.double()[:, : len(one)] - one).square().sum(1) for one in vectors]
        found.append([int(error.argmin()) for error in errors])
    return found


@given(st.integers(1, 4), st.integers(1, 11), st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**31))
@settings(max_examples=80, deadline=None)
def test_each_vector_takes_the_nearest(rows: int, size: int, length: int, codewords: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    weights = torch.randn(rows, size, generator=random)
    codebook = torch.randn(codewords, length, generator=random)
    found = nearest_vector(weights, codebook)
    assert found.dtype == torch.int32
    assert found.tolist() == twin(weights, codebook)


def test_a_tie_goes_to_the_first() -> None:
    codebook = torch.tensor([[5.0, 5.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    assert nearest_vector(torch.tensor([[0.0, 0.0, 1.0, 0.0]]), codebook).tolist() == [[1, 1]]


def test_far_from_zero_no_digit_is_lost() -> None:
    """Products of numbers near 1000 have steps of 0.06, and these codewords are 0.01 apart."""
    codebook = 1000 + torch.arange(8.0)[:, None] * torch.tensor([0.01, -0.01])
    assert nearest_vector(codebook.reshape(1, -1), codebook).tolist() == [list(range(8))]


def test_few_distances_are_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    most, cdist = 0, torch.cdist

    def count(vectors: Tensor, codebook: Tensor, compute_mode: str) -> Tensor:
        nonlocal most
        distances: Tensor = cdist(vectors, codebook, compute_mode=compute_mode)
        most = max(most, distances.numel())
        return distances

    monkeypatch.setattr(torch, "cdist", count)
    rows, codebook = torch.randn(100, 41), torch.randn(16, 4)
    expected = nearest_vector(rows, codebook)
    assert most == 1000 * 16
    monkeypatch.setattr(module, "DISTANCES", 100)
    assert torch.equal(nearest_vector(rows, codebook), expected)
    monkeypatch.setattr(module, "DISTANCES", 1)  # fewer than one vector has
    assert torch.equal(nearest_vector(rows, codebook), expected)
