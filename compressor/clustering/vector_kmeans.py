"""Codebooks of vectors: k-means in d dimensions, reproducible."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.ops.nearest_vector import nearest_vector

__all__ = ["vector_codebook"]

ITERATIONS = 30
ENOUGH = 1e-3  # share of the vectors that still change their codeword
VECTORS_PER_CODEWORD = 256  # that are clustered; of more, so many are drawn
FEWEST_PER_CODEWORD = 16  # that are clustered, however many codewords
MOST_VECTORS = 1 << 17  # that are clustered beyond that: the time is in proportion to their number times K


def vector_codebook(vectors: Tensor, codewords: int, importance: Tensor | None = None) -> Tensor:
    """Returns K vectors of little squared error to the given ones, each of which takes the nearest.

    Lloyd's iterations from the start of k-means++, always the same; a codeword that no vector uses is moved to the
    vector that is farthest from its own. With no more than K distinct vectors, those are returned. Of more than 256
    vectors a codeword, so many are drawn, and no more than 131,072 or 16 a codeword, whichever is more.

    Args:
        vectors: float32[n, d], finite, n >= 1.
        codewords: K, at least 1.
        importance: float[n, d] >= 0, the weight of each squared error in the means; None: all equal.

    Returns:
        float32[K', d], K' <= K.

    Example:
        >>> vectors = torch.tensor([[0.0, 1.0], [0.0, 3.0], [8.0, 8.0]])
        >>> vector_codebook(vectors, 2).sort(0).values.tolist()
        [[0.0, 2.0], [8.0, 8.0]]

    Reference: Arthur, Vassilvitskii, "k-means++: The Advantages of Careful Seeding", SODA 2007; Stock, Joulin,
    Gribonval, Graham, Jegou, "And the Bit Goes Down", ICLR 2020, for vectors of weights.
    """
    random = torch.Generator().manual_seed(0)
    most = max(FEWEST_PER_CODEWORD * codewords, min(VECTORS_PER_CODEWORD * codewords, MOST_VECTORS))
    if len(vectors) > most:
        chosen = torch.randperm(len(vectors), generator=random)[:most].to(vectors.device)
        vectors, importance = vectors[chosen], None if importance is None else importance[chosen]
    distinct: Tensor = vectors.unique(dim=0)
    if len(distinct) <= codewords:
        return distinct
    codebook = _start(vectors, codewords, random)
    mass = torch.ones_like(vectors) if importance is None else _positive(importance)
    before = torch.full((len(vectors),), -1, dtype=torch.int32, device=vectors.device)
    for _ in range(ITERATIONS):
        nearest = nearest_vector(vectors, codebook)[:, 0]
        if int((nearest != before).sum()) <= ENOUGH * len(vectors):
            break
        codebook, before = _means(vectors, mass, nearest, codebook), nearest
    return codebook


def _start(vectors: Tensor, codewords: int, random: torch.Generator) -> Tensor:
    """Returns K of the vectors, each drawn by its squared distance to the nearest one drawn before."""
    chosen = [int(torch.randint(len(vectors), (), generator=random))]
    distance = torch.full((len(vectors),), torch.inf, dtype=torch.float64, device=vectors.device)
    while len(chosen) < codewords:
        torch.minimum(distance, (vectors - vectors[chosen[-1]]).double().square().sum(dim=1), out=distance)
        share = distance.cumsum(dim=0)
        drawn = share[-1] * torch.rand((), generator=random, dtype=torch.float64).to(share.device)
        chosen.append(min(int(torch.searchsorted(share, drawn, right=True)), len(vectors) - 1))
    return vectors[chosen]


def _means(vectors: Tensor, mass: Tensor, nearest: Tensor, codebook: Tensor) -> Tensor:
    """Returns the mean of the vectors of each codeword; unused ones become the vectors farthest from their own."""
    count, length = codebook.shape
    places = (nearest.long()[:, None] * length + torch.arange(length, device=nearest.device)).reshape(-1)
    total = torch.bincount(places, (mass.double() * vectors.double()).reshape(-1), count * length)
    weight = torch.bincount(places, mass.double().reshape(-1), count * length)
    means = (total / weight.clamp(min=torch.finfo(torch.float64).tiny)).float().view(count, length)
    unused = torch.nonzero(torch.bincount(nearest, minlength=count) == 0).flatten()
    if len(unused):
        errors = (vectors - codebook[nearest.long()]).square().sum(dim=1)
        means[unused] = vectors[errors.sort(descending=True, stable=True).indices[: len(unused)]]
    return means


def _positive(importance: Tensor) -> Tensor:
    """Adds a little to every importance, so that every codeword has a mean; if all are zero, returns ones."""
    mean = importance.double().mean()
    return importance.double() / mean + 1e-6 if mean > 0 else torch.ones_like(importance)
