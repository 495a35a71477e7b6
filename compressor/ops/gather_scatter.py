"""The gather and scatter under every scheme: ``w_i = codebook[a_i]``, ``dL/dcodebook_k = sum of dL/dw_i over a_i = k``.

Memory is O(N): a step saves one index per weight and never an N x K matrix. For float32 on a processor all of it is
machine code; elsewhere the stock operators compute the same result. No backward pass writes to the gradient it is
given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from compressor.formats.jit.cache import compiled_kernel
from compressor.ops.buffer_pool import active_pool
from compressor.ops.codebook_scale import CodebookScale
from compressor.ops.nearest import NearestCodeword
from compressor.ops.parallel import Sliced, cache_chunks, on_processor, parallel_for, thread_slices

if TYPE_CHECKING:
    from compressor.formats.jit.builder import Code

__all__ = [
    "frozen_lookup",
    "gather_codewords",
    "lookup",
    "straight_through",
    "sum_by_index",
    "write_codewords",
    "zero_where_assigned",
]

_LANES = 4  # sums kept side by side, so that an addition need not wait for the previous one to the same codeword
# Fewer weights per codeword than this, and the stock operator is as fast and needs no memory for each thread.
_LEAST_TERMS_PER_CODEWORD = 64
# Unused places before the sums of each thread: threads whose sums share a cache line wait for each other. An index of
# -1, which a damaged state can have, adds to these places instead of to another thread's sums.
_PADDING = 8


def gather_codewords(codebook: Tensor, indices: Tensor) -> Tensor:
    """Returns ``codebook[indices]`` in memory of the active buffer pool.

    Args:
        codebook: float[K].
        indices: int, any shape, below K. Where an index is below 0 the result is any number.

    Example:
        >>> gather_codewords(torch.tensor([1.0, 2.0]), torch.tensor([[0, 1, 1]], dtype=torch.uint8)).tolist()
        [[1.0, 2.0, 2.0]]
    """
    weights = active_pool().empty(indices.shape, codebook.dtype, codebook.device)
    if on_processor(weights):
        write_codewords(weights, codebook, indices)
    else:
        torch.index_select(codebook, 0, indices.reshape(-1).int(), out=weights.view(-1))
    return weights


def write_codewords(weights: Tensor, codebook: Tensor, indices: Tensor) -> None:
    """Writes the codeword of each index over the weight, in place; where the index is below 0 the weight stays.

    Autograd does not see the change: assigned weights that have not moved since are overwritten by the same number.

    Args:
        weights: float, any shape.
        codebook: float32[K].
        indices: int of that shape, below K.

    Example:
        >>> weights = torch.tensor([1.0, 2.0])
        >>> write_codewords(weights, torch.tensor([4.0]), torch.tensor([-1, 0], dtype=torch.int32))
        >>> weights.tolist()
        [1.0, 4.0]
    """
    indices = indices if indices.dtype.is_signed else indices.short()  # the kernel takes the first bit for a sign
    constants = _write_codewords, 8 * indices.element_size()
    fits = on_processor(weights) and weights.is_contiguous()
    kernel = compiled_kernel(*constants, vectorise=True) if fits else None
    if kernel is None:
        detached = weights.data  # shares the memory but not the version counter, so that autograd sees no change
        codewords = codebook.to(weights.dtype).index_select(0, indices.clamp(min=0).reshape(-1).int())
        torch.where(indices < 0, detached, codewords.view(weights.shape), out=detached)
        return
    codebook, indices = codebook.float().contiguous(), indices.contiguous()
    parallel_for(kernel, thread_slices(weights.numel()), [Sliced(weights), codebook, Sliced(indices)])


def _write_codewords(code: Code, bits: int) -> None:
    """Builds the kernel of ``write_codewords`` for indices of so many bits."""
    weights, codebook, indices = code.array(0, 32), code.array(1, 32), code.array(2, bits)
    count, place = code.number(3), code.variable(0)
    with code.loop(lambda: place.get() < count):
        at = place.get()
        index = indices[at]
        is_free = index >> (bits - 1)  # the sign
        weights[at] = is_free.choose(weights[at], codebook[is_free.choose(0, index)])  # bits: they are only copied
        place.set(at + 1)
    code.give(0)


def zero_where_assigned(gradient: Tensor, indices: Tensor, out: Tensor) -> None:
    """Writes the gradient to ``out``, and 0 where the index is not below 0.

    Args:
        gradient: float, any shape and strides; it stays as it is.
        indices: signed int of that shape.
        out: of the shape and dtype of ``gradient``, contiguous, in memory of its own.

    Example:
        >>> out = torch.empty(2)
        >>> zero_where_assigned(torch.tensor([1.0, 2.0]), torch.tensor([-1, 0], dtype=torch.int32), out)
        >>> out.tolist()
        [1.0, 0.0]
    """
    bits = 8 * indices.element_size()
    kernel = compiled_kernel(_write_free_gradient, bits, vectorise=True) if on_processor(gradient) else None
    if kernel is None:
        torch.where(indices < 0, gradient, torch.zeros((), dtype=gradient.dtype, device=gradient.device), out=out)
        return
    arguments = [Sliced(gradient.contiguous()), Sliced(indices.contiguous()), Sliced(out)]
    parallel_for(kernel, thread_slices(out.numel()), arguments)


def _write_free_gradient(code: Code, bits: int) -> None:
    """Builds the kernel of ``zero_where_assigned`` for indices of so many bits."""
    gradient, indices, out = code.array(0, 32), code.array(1, bits), code.array(2, 32)
    count, place = code.number(3), code.variable(0)
    with code.loop(lambda: place.get() < count):
        at = place.get()
        out[at] = (indices[at] >> (bits - 1)).choose(gradient[at], 0)
        place.set(at + 1)
    code.give(0)


def sum_by_index(terms: Tensor, indices: Tensor, codewords: int) -> Tensor:
    """Returns the sum of the terms of each index, added up in double precision where codewords are few.

    Args:
        terms: float, any shape.
        indices: int of that shape, from 0 to below ``codewords``.
        codewords: how many sums there are, K.

    Returns:
        float[K].

    Example:
        >>> sum_by_index(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 0], dtype=torch.uint8), 3).tolist()
        [5.0, 0.0, 2.0]
    """
    # Each thread sums for itself: with many codewords, adding up the threads' sums would take longer than the rest.
    few = codewords * _LEAST_TERMS_PER_CODEWORD <= terms.numel()
    kernel = compiled_kernel(_write_sums, 8 * indices.element_size()) if few and on_processor(terms) else None
    if kernel is not None:
        # A gradient may have strides of 0: that of ``weight.sum()`` is one number seen as many.
        terms, indices, slices = terms.contiguous(), indices.contiguous(), thread_slices(terms.numel())
        sums = np.zeros((len(slices), _PADDING + codewords, _LANES))
        addresses = [sums[number, _PADDING:].ctypes.data for number in range(len(slices))]
        parallel_for(kernel, slices, [Sliced(terms), Sliced(indices), addresses])
        return torch.from_numpy(sums.sum((0, 2))[_PADDING:]).float()
    total, terms, indices = terms.new_zeros(codewords), terms.reshape(-1), indices.reshape(-1)
    for chunk in cache_chunks(terms):
        total.index_add_(0, indices[chunk].int(), terms[chunk])
    return total


def _write_sums(code: Code, bits: int) -> None:
    """Builds the kernel of ``sum_by_index`` for indices of so many bits."""
    terms, indices, sums, count = code.array(0, 32), code.array(1, bits), code.array(2, 64), code.number(3)
    place = code.variable(0)

    def add(lane: int) -> None:
        at = place.get() + lane
        sums.add(indices[at] * _LANES + lane, terms.real(at))

    with code.loop(lambda: place.get() + (_LANES - 1) < count):
        for lane in range(_LANES):
            add(lane)
        place.set(place.get() + _LANES)
    with code.loop(lambda: place.get() < count):
        add(0)
        place.set(place.get() + 1)
    code.give(0)


class _Lookup(Function):
    @staticmethod
    def forward(ctx: Any, codebook: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.codewords = len(codebook)
        return gather_codewords(codebook, indices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        return sum_by_index(gradient, indices, ctx.codewords), None


class _FrozenLookup(Function):
    @staticmethod
    def forward(ctx: Any, master: Tensor, codebook: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.pool = active_pool()
        write_codewords(master, codebook, indices)
        return master  # as a view: autograd takes an input that is returned for one

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (indices,) = ctx.saved_tensors
        to_master = ctx.pool.empty(gradient.shape, gradient.dtype, gradient.device)
        zero_where_assigned(gradient, indices, to_master)
        return to_master, None, None


class _StraightThrough(Function):
    @staticmethod
    def forward(ctx: Any, master: Tensor, values: Tensor, indices: Tensor | None, scale: CodebookScale) -> Tensor:
        codebook, ctx.order = scale.codebook(values)
        codebook = codebook.view(-1)
        ctx.scale, ctx.codewords, ctx.dtype = scale, len(codebook), master.dtype
        # The indices wait for the backward pass, a large part of a step's memory: they take a byte each where they fit.
        dtype = torch.uint8 if len(codebook) <= 256 else torch.int32
        if indices is None:
            pool = active_pool()
            saved = pool.empty(master.shape, dtype, master.device)
            weights = pool.empty(master.shape, codebook.dtype, master.device)
            NearestCodeword(codebook)(master, saved, weights)
        else:
            saved, weights = indices.to(dtype), gather_codewords(codebook, indices)
        ctx.save_for_backward(saved)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        to_values = None
        if ctx.needs_input_grad[1]:
            (saved,) = ctx.saved_tensors
            to_values = ctx.scale.gradient(sum_by_index(gradient, saved, ctx.codewords), ctx.order)
        return gradient.to(ctx.dtype), to_values, None, None


def frozen_lookup(master: Tensor, codebook: Tensor, indices: Tensor) -> Tensor:
    """Returns ``codebook[indices]``, and the master weight where the index is -1: only there is a gradient.

    The values are written into the master weight, whose memory the result shares: nothing is copied. A caller that
    keeps the weights has to clone them before an optimiser's step changes the master weight.

    Args:
        master: float, the trained dense weights; overwritten where the index is not -1.
        codebook: float32[K], without gradient.
        indices: signed int of the shape of ``master``.

    Example:
        >>> master = torch.tensor([0.4, 0.9], requires_grad=True)
        >>> frozen_lookup(master, torch.tensor([0.0, 1.0]), torch.tensor([-1, 1], dtype=torch.int32)).sum().backward()
        >>> master.grad.tolist()
        [1.0, 0.0]
    """
    weights: Tensor = _FrozenLookup.apply(master, codebook, indices)
    return weights


def lookup(codebook: Tensor, indices: Tensor) -> Tensor:
    """Returns ``codebook[indices]``; the gradient of a codeword is the sum over its entries.

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
    weights: Tensor = _Lookup.apply(codebook, indices)
    return weights


def straight_through(
    master: Tensor, values: Tensor, indices: Tensor | None = None, scale: CodebookScale | None = None
) -> Tensor:
    """Returns ``codebook[indices]``; the gradient passes to the master weights unchanged, and to the codebook.

    Args:
        master: float, the trained dense weights.
        values: float32[K], the codebook as a group keeps it.
        indices: int of the shape of ``master``; None: those of the nearest codewords, in a codebook that ascends.
        scale: how the codebook follows from ``values``; None: it equals them.

    Example:
        >>> master = torch.tensor([0.4, 0.9], requires_grad=True)
        >>> straight_through(master, torch.tensor([0.0, 1.0]), torch.tensor([0, 1], dtype=torch.int32)).tolist()
        [0.0, 1.0]

    Reference: Bengio, Leonard, Courville, "Estimating or Propagating Gradients Through Stochastic Neurons", 2013.
    """
    # One function for search, lookup and codebook: each one more per layer costs a deep model about 1 % of a step.
    weights: Tensor = _StraightThrough.apply(master, values, indices, scale or CodebookScale())
    return weights
