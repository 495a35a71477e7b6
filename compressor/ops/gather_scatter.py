"""The gather and scatter under every scheme: ``w_i = codebook[a_i]``, ``dL/dcodebook_k = sum of dL/dw_i over a_i = k``.

Memory is O(N): a step saves one index per weight and never an N x K matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from compressor.ops.buffer_pool import workspace
from compressor.ops.codebook_scale import Units
from compressor.ops.indexing import blocks, gather, only_free, settle, sum_by_index
from compressor.ops.nearest import Hash
from compressor.ops.ownership import own

__all__ = ["fixed", "lookup", "nearest", "nearest_by_row", "straight_through"]


def nearest(weights: Tensor, codebook: Tensor) -> Tensor:
    """Find the nearest codeword of each weight; a tie goes to the lower one.

    Args:
        weights: float32, any shape, finite.
        codebook: float32[K], ascending.

    Returns:
        int32 of the shape of ``weights``.

    Example:
        >>> nearest(torch.tensor([-0.9, 0.5, 0.6]), torch.tensor([-1.0, 0.0, 1.0])).tolist()
        [0, 1, 2]
    """
    flat = weights.reshape(-1)
    indices = torch.empty(weights.shape, dtype=torch.int32, device=weights.device)
    find, values = Hash(codebook), torch.empty_like(flat[next(blocks(flat), slice(0))], dtype=codebook.dtype)
    for block in blocks(flat):
        found = indices.view(-1)[block]
        find(flat[block], found, values[: len(found)])
    return indices


def nearest_by_row(weights: Tensor, codebooks: Tensor) -> Tensor:
    """Find the nearest codeword of each weight in the codebook of its slice of axis 0; a tie goes to the lower one.

    Args:
        weights: float32, any shape, finite.
        codebooks: float32[B, K], each ascending; B is 1, or the slices that axis 0 has.

    Returns:
        int32 of the shape of ``weights``: positions in the codebooks laid one after the other.

    Example:
        >>> nearest_by_row(torch.tensor([[0.1, 0.9], [0.1, 7.0]]), torch.tensor([[0.0, 1.0], [0.0, 8.0]])).tolist()
        [[0, 1], [2, 3]]
    """
    books, codewords = codebooks.shape
    if books == 1:
        return nearest(weights, codebooks[0])
    bounds = ((codebooks[:, 1:] + codebooks[:, :-1]) / 2).contiguous()
    found = torch.searchsorted(bounds, weights.reshape(books, -1), out_int32=True)
    first = torch.arange(0, books * codewords, codewords, dtype=torch.int32, device=found.device)
    return (found + first[:, None]).view(weights.shape)


class _Lookup(Function):
    @staticmethod
    def forward(ctx: Any, codebook: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.codewords = len(codebook)
        return gather(codebook, indices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        return sum_by_index(gradient, indices, ctx.codewords), None


class _Fixed(Function):
    @staticmethod
    def forward(ctx: Any, latent: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(indices)
        settle(latent, codebook, indices)
        return latent, latent.new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, companion: Tensor) -> tuple[Tensor, None, None]:
        (indices,) = ctx.saved_tensors
        gradient = own(gradient, companion)
        only_free(gradient, indices)
        return gradient, None, None


class _StraightThrough(Function):
    @staticmethod
    def forward(ctx: Any, latent: Tensor, values: Tensor, indices: Tensor | None, units: Units) -> Tensor:
        codebook, ctx.order = units.codebook(values)
        codebook = codebook.view(-1)
        ctx.units, ctx.codewords, ctx.dtype = units, len(codebook), latent.dtype
        # A large part of a step's memory: indices wait here for the backward pass, in a byte each where they fit.
        dtype = torch.uint8 if len(codebook) <= 256 else torch.int32
        if indices is None:
            kept = workspace(latent.shape, dtype, latent.device)
            weights = workspace(latent.shape, codebook.dtype, latent.device)
            Hash(codebook)(latent, kept, weights)
        else:
            kept, weights = indices.to(dtype), gather(codebook, indices)
        ctx.save_for_backward(kept)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        to_values = None
        if ctx.needs_input_grad[1]:
            (kept,) = ctx.saved_tensors
            to_values = ctx.units.gradient(sum_by_index(gradient, kept, ctx.codewords), ctx.order)
        return gradient.to(ctx.dtype), to_values, None, None


def fixed(latent: Tensor, codebook: Tensor, indices: Tensor) -> Tensor:
    """Give ``codebook[indices]``, and the latent weight where the index is -1: it alone has a gradient.

    The latent tensor itself takes these values, and its memory is what is given: nothing is copied. Whoever wants to
    keep the weights has to clone them, before an optimiser's step changes the latent tensor.

    Args:
        latent: float, the trained dense weights; written to where the index is not -1.
        codebook: float32[K], without gradient.
        indices: int of the shape of ``latent``.

    Example:
        >>> latent = torch.tensor([0.4, 0.9], requires_grad=True)
        >>> fixed(latent, torch.tensor([0.0, 1.0]), torch.tensor([-1, 1], dtype=torch.int32)).sum().backward()
        >>> latent.grad.tolist()
        [1.0, 0.0]
    """
    result: Tensor = _Fixed.apply(latent, codebook, indices)[0]
    return result


def lookup(codebook: Tensor, indices: Tensor) -> Tensor:
    """Give ``codebook[indices]``; the gradient of a codeword is the sum over its entries.

    Args:
        codebook: float[K].
        indices: int, any shape, in 0..K-1.

    Example:
        >>> codebook = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> lookup(codebook, torch.tensor([0, 1, 1], dtype=torch.int32)).sum().backward()
        >>> codebook.grad.tolist()
        [1.0, 2.0]

    Reference: Han, Mao, Dally, "Deep Compression", ICLR 2016, section 3.3.
    """
    result: Tensor = _Lookup.apply(codebook, indices)
    return result


def straight_through(
    latent: Tensor, values: Tensor, indices: Tensor | None = None, units: Units | None = None
) -> Tensor:
    """Give ``codebook[indices]`` while the gradient passes to the latent weights unchanged, and to the codebook.

    Args:
        latent: float, the trained dense weights.
        values: float32[K], the codebook as a group keeps it.
        indices: int of the shape of ``latent``; None: the nearest codewords, in a codebook that ascends.
        units: how the codebook comes from ``values``; None: it is them.

    Example:
        >>> latent = torch.tensor([0.4, 0.9], requires_grad=True)
        >>> straight_through(latent, torch.tensor([0.0, 1.0]), torch.tensor([0, 1], dtype=torch.int32)).tolist()
        [0.0, 1.0]

    Reference: Bengio, Leonard, Courville, "Estimating or Propagating Gradients Through Stochastic Neurons", 2013.
    """
    # All in one: each function that autograd calls for each layer costs a step of a deep model about one percent.
    weights: Tensor = _StraightThrough.apply(latent, values, indices, units or Units())
    return weights
