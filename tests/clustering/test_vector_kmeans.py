"""The k-means of vectors: its fixed point, its use of importance, and its reproducibility."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from compressor.clustering import vector_kmeans
from compressor.clustering.vector_kmeans import _means, vector_codebook
from compressor.ops.nearest_vector import nearest_vector


def clusters(vectors: Tensor, codebook: Tensor) -> Tensor:
    return (vectors[:, None] - codebook).square().sum(2).argmin(1)


def error(vectors: Tensor, codebook: Tensor) -> float:
    return float((vectors - codebook[clusters(vectors, codebook)]).square().mean())


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("weighted", [False, True])
def test_each_codeword_is_the_mean_of_its_vectors(length: int, weighted: bool) -> None:
    torch.manual_seed(0)
    vectors, importance = torch.randn(300, length), torch.rand(300, length) + 0.1
    codebook = vector_codebook(vectors, 6, importance if weighted else None)
    assert codebook.shape == (6, length)
    mass, own = importance if weighted else torch.ones_like(vectors), clusters(vectors, codebook)
    for number in range(6):
        here = own == number
        mean = (mass[here] * vectors[here]).sum(0) / mass[here].sum(0)
        torch.testing.assert_close(codebook[number], mean, atol=5e-3, rtol=5e-3)  # a little is added to importance


def test_close_to_the_best_of_many_starts() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(4000, 3)
    best = KMeans(32, n_init=10, random_state=0).fit(vectors.numpy())
    assert error(vectors, vector_codebook(vectors, 32)) < 1.05 * best.inertia_ / 12000


def test_few_distinct_vectors_are_kept_exactly() -> None:
    kinds = torch.tensor([[0.5, -0.5], [0.25, 8.0], [-3.0, 0.0]])
    vectors = kinds[torch.arange(90) % 3]
    for codewords in (3, 4, 16):
        assert vector_codebook(vectors, codewords).sort(0).values.tolist() == kinds.sort(0).values.tolist()
    assert len(vector_codebook(vectors, 2)) == 2


def test_vectors_of_no_importance_do_not_count() -> None:
    vectors = torch.tensor([[0.0], [1.0], [10.0], [30.0]])
    importance = torch.tensor([[1.0], [1.0], [1e6], [1.0]])
    assert vector_codebook(vectors, 1, importance).item() == pytest.approx(10.0, abs=0.05)
    assert vector_codebook(vectors, 1, torch.zeros_like(vectors)).item() == pytest.approx(10.25)


def test_no_codeword_is_unused() -> None:
    """Of 400 vectors all but twelve are nearly the same: codewords drawn evenly would all be among those."""
    torch.manual_seed(0)
    vectors = torch.cat([torch.randn(388, 2) * 1e-3, torch.randn(12, 2) * 100])
    codebook = vector_codebook(vectors, 13)
    assert len(clusters(vectors, codebook).unique()) == 13
    assert error(vectors, codebook) < 1e-3 * float(vectors.square().mean())


def test_a_codeword_without_vectors_moves_to_the_vector_that_is_worst_off() -> None:
    vectors = torch.tensor([[0.0, 0.0], [2.0, 0.0], [9.0, 0.0], [5.0, 5.0]])
    nearest, codebook = torch.tensor([0, 0, 0, 2]), torch.tensor([[1.0, 0.0], [100.0, 0.0], [5.0, 4.0]])
    moved = _means(vectors, torch.ones_like(vectors), nearest, codebook)
    assert moved.tolist() == [[pytest.approx(11 / 3), 0.0], [9.0, 0.0], [5.0, 5.0]]


def test_the_same_codebook_every_time_whatever_torch_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_kmeans, "VECTORS_PER_CODEWORD", 20)
    vectors = torch.from_numpy(np.random.default_rng(0).normal(size=(1000, 4)).astype(np.float32))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = vector_codebook(vectors, 16)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(vector_codebook(vectors, 16), first)
    monkeypatch.setattr(vector_kmeans, "VECTORS_PER_CODEWORD", 1000)
    assert not torch.equal(vector_codebook(vectors, 16), first)
    assert error(vectors, first) < 1.15 * error(vectors, vector_codebook(vectors, 16))


@pytest.mark.parametrize(("codewords", "drawn"), [(4, 1024), (16, 2000), (200, 3200)])
def test_so_many_vectors_are_clustered(codewords: int, drawn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_kmeans, "MOST_VECTORS", 2000)
    found: set[int] = set()

    def counted(vectors: Tensor, codebook: Tensor) -> Tensor:
        found.add(len(vectors))
        return nearest_vector(vectors, codebook)

    monkeypatch.setattr(vector_kmeans, "nearest_vector", counted)
    vector_codebook(torch.randn(5000, 2, generator=torch.Generator().manual_seed(0)), codewords)
    assert found == {drawn}
