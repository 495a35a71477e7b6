"""The assignment of vectors of weights to their nearest codewords."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["nearest_vector"]

DISTANCES = 1 << 18  # computed at a time, so that memory is linear in the weights and distances stay in the cache


def nearest_vector(rows: Tensor, codebook: Tensor) -> Tensor:
    """Returns the index of the codeword nearest to each vector of d consecutive weights of a row; a tie: the first.

    Where d does not divide a row its last vector is shorter, and is compared with as much of the codewords.

    Args:
        rows: float32[R, S], finite.
        codebook: float32[K, d].

    Returns:
        int32[R, V] with V = ceil(S / d).

    Example:
        >>> nearest_vector(torch.tensor([[0.1, 0.9, 0.8]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])).tolist()
        [[0, 1]]
    """
    length, size = codebook.shape[1], rows.shape[1]
    whole = size // length * length
    parts = [_search(rows[:, :whole].reshape(-1, length), codebook).view(len(rows), -1)]
    if whole < size:
        parts.append(_search(rows[:, whole:], codebook[:, : size - whole])[:, None])
    return torch.cat(parts, dim=1)


def _search(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Returns the index of the nearest codeword of each vector, int32[n]."""
    indices = torch.empty(len(vectors), dtype=torch.int32, device=vectors.device)
    step = max(1, DISTANCES // len(codebook))
    for start in range(0, len(vectors), step):
        # From the differences and not by a product of matrices, which is faster but depends on the vectors beside: each
        # vector gets the same index wherever it is looked up.
        distances = torch.cdist(vectors[start : start + step], codebook, compute_mode="donot_use_mm_for_euclid_dist")
        indices[start : start + step] = distances.argmin(dim=1)
    return indices
