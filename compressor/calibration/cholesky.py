"""Cholesky factors of the largest matrices there are, in the memory of the matrices themselves."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["column_major", "factorise"]


def column_major(matrices: Tensor) -> Tensor:
    """Returns a copy of symmetric matrices, float[G, d, d], in the order of LAPACK, which then needs no other."""
    return matrices.contiguous().clone().mT


def factorise(matrices: Tensor, upper: bool = False) -> bool:
    """Replaces symmetric matrices by their Cholesky factors, and returns whether all of these exist and are finite.

    Args:
        matrices: float[G, d, d], as of ``column_major``.
        upper: whether each becomes U with ``U^T U``, in place of L with ``L L^T``.

    Example:
        >>> matrices = column_major(torch.tensor([[[4.0, 2.0], [2.0, 2.0]]]))
        >>> factorise(matrices), matrices.tolist()
        (True, [[[2.0, 0.0], [1.0, 1.0]]])
    """
    failed = torch.empty(len(matrices), dtype=torch.int32, device=matrices.device)
    torch.linalg.cholesky_ex(matrices, upper=upper, out=(matrices, failed))
    # The sum stands for all entries: asking each of them would take another matrix.
    return not bool(failed.any()) and bool(torch.isfinite(matrices.sum()))
