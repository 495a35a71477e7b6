"""The soft assignment: each weight becomes a mean of all codewords, in which the near ones count most.

    p_ik = softmax over k of -(w_i - c_k)^2 / tau        w~_i = sum over k of p_ik c_k

Its gradients are closed forms, which the backward pass computes chunk by chunk: a step saves the N weights and the K
codewords, never the N x K matrix p.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

__all__ = ["soft_assignment", "soft_gradient"]

ENTRIES = 1 << 20  # of p in memory at a time


def soft_assignment(master: Tensor, codebook: Tensor, temperature: float, entries: int = ENTRIES) -> Tensor:
    """Returns the soft assignment of each weight.

    Args:
        master: float, any shape.
        codebook: float[K], any order.
        temperature: tau, in the squared unit of the weights. At half the squared spacing of the codewords the result is
            nearly the weight itself; towards 0 it becomes the nearest codeword.
        entries: of the N x K matrix that are computed at a time.

    Example:
        >>> soft = soft_assignment(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.0, 1.0]), temperature=0.5)
        >>> [round(weight, 3) for weight in soft.tolist()]
        [0.119, 0.5, 0.881]

    Reference: Cho, Alizadeh-Vahid, Adya, Rastegari, "DKM", ICLR 2022, without its iterations: here the codebook is
    learnt from the loss.
    """
    result: Tensor = _SoftAssignment.apply(master, codebook, None, temperature, entries)
    return result


def soft_gradient(master: Tensor, codebook: Tensor, indices: Tensor, temperature: float) -> Tensor:
    """Returns ``codebook[indices]``, with the gradients of the soft assignment.

    Args:
        indices: int of the shape of ``master``.
        master, codebook, temperature: as for ``soft_assignment``.

    Example:
        >>> master = torch.tensor([0.4, 0.9], requires_grad=True)
        >>> codebook, indices = torch.tensor([0.0, 1.0]), torch.tensor([0, 1], dtype=torch.int32)
        >>> soft_gradient(master, codebook, indices, temperature=0.5).tolist()
        [0.0, 1.0]
    """
    result: Tensor = _SoftAssignment.apply(master, codebook, indices, temperature, ENTRIES)
    return result


class _SoftAssignment(Function):
    @staticmethod
    def forward(
        ctx: Any, master: Tensor, codebook: Tensor, indices: Tensor | None, temperature: float, entries: int
    ) -> Tensor:
        ctx.save_for_backward(master, codebook)
        ctx.temperature, ctx.entries = temperature, entries
        if indices is not None:
            return codebook.index_select(0, indices.reshape(-1).int()).view(indices.shape)
        assigned = torch.empty_like(master, dtype=codebook.dtype, memory_format=torch.contiguous_format)
        for chunk, shares in _shares_by_chunk(master, codebook, temperature, entries):
            assigned.view(-1)[chunk] = shares @ codebook
        return assigned

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        master, codebook = ctx.saved_tensors
        to_master = torch.empty_like(master, memory_format=torch.contiguous_format)
        to_codebook = torch.zeros_like(codebook)
        flat, weights = gradient.reshape(-1), master.reshape(-1).to(codebook.dtype)
        twice = 2 / ctx.temperature
        for chunk, shares in _shares_by_chunk(master, codebook, ctx.temperature, ctx.entries):
            mean = shares @ codebook
            # dw~/dw = 2 Var(c) / tau, the variance under the weight's own shares
            variance = (shares * (codebook - mean[:, None]).square()).sum(1)
            to_master.view(-1)[chunk] = (flat[chunk] * twice * variance).to(master.dtype)
            # dw~/dc_k = p_k (1 + 2 (w - c_k) (c_k - w~) / tau)
            slopes = 1 + twice * (weights[chunk][:, None] - codebook) * (codebook - mean[:, None])
            to_codebook += flat[chunk] @ (shares * slopes)
        return to_master, to_codebook, None, None, None


def _shares_by_chunk(
    master: Tensor, codebook: Tensor, temperature: float, entries: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yields the shares p of all codewords in each weight, float[n, K], for a chunk of n weights at a time."""
    weights = master.reshape(-1).to(codebook.dtype)
    size = max(1, entries // len(codebook))
    for start in range(0, weights.numel(), size):
        chunk = slice(start, start + size)
        yield chunk, torch.softmax((weights[chunk][:, None] - codebook).square() / -temperature, dim=1)
