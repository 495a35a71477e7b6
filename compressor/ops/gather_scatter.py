"""The gather and scatter under every scheme: ``w_i = codebook[a_i]``, ``dL/dcodebook_k = sum of dL/dw_i over a_i = k``.

Memory is O(N): a step saves one index per weight and never an N x K matrix. As machine code for float32 on a processor;
elsewhere by the stock operators, to the same result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from compressor.formats.jit.cache import compiled_kernel
from compressor.ops.buffer_pool import workspace
from compressor.ops.codebook_scale import CodebookScale
from compressor.ops.nearest import NearestCodeword
from compressor.ops.ownership import own
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

_LANES = 4  # sums kept side by side, so that an addition need not wait for the last one to the same codeword
_TERMS_FOR_EACH = 64  # codeword, at least: with fewer the stock operator is as fast, and takes no memory
# Codewords before the sums of each thread: two that share a cache line wait for each other. And what an index of -1,
# which can come from a damaged state, is summed to is nobody's.
_APART = 8


def gather_codewords(codebook: Tensor, indices: Tensor) -> Tensor:
    """Give ``codebook[indices]``, in memory that is used again; of an index below 0, any number.

    Args:
        codebook: float[K].
        indices: int, any shape, below K.

    Example:
        >>> gather_codewords(torch.tensor([1.0, 2.0]), torch.tensor([[0, 1, 1]], dtype=torch.uint8)).tolist()
        [[1.0, 2.0, 2.0]]
    """
    weights = workspace(indices.shape, codebook.dtype, codebook.device)
    if on_processor(weights):
        write_codewords(weights, codebook, indices)
    else:
        torch.index_select(codebook, 0, indices.reshape(-1).int(), out=weights.view(-1))
    return weights


def write_codewords(weights: Tensor, codebook: Tensor, indices: Tensor) -> None:
    """Put the codeword of each index in the weight's place, in memory; where the index is below 0 the weight stays.

    Autograd does not see it: weights that have settled and did not move since are written as they are.

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
    indices = indices if indices.dtype.is_signed else indices.short()  # a first bit that is set is no sign there
    write = _write_codewords, 8 * indices.element_size()
    native = compiled_kernel(*write, vectorise=True) if on_processor(weights) and weights.is_contiguous() else None
    if native is None:
        here = weights.data  # with a count of changes of its own
        codewords = codebook.to(here.dtype).index_select(0, indices.clamp(min=0).reshape(-1).int()).view(here.shape)
        torch.where(indices < 0, here, codewords, out=here)
        return
    codebook, indices = codebook.float().contiguous(), indices.contiguous()
    parallel_for(native, thread_slices(weights.numel()), [Sliced(weights), codebook, Sliced(indices)])


def _write_codewords(code: Code, item: int) -> None:
    weights, codebook, indices = code.array(0, 32), code.array(1, 32), code.array(2, item)
    count, place = code.number(3), code.variable(0)
    with code.loop(lambda: place.get() < count):
        at = place.get()
        index = indices[at]
        is_free = index >> (item - 1)  # the sign
        weights[at] = is_free.choose(weights[at], codebook[is_free.choose(0, index)])  # bits: they are only copied
        place.set(at + 1)
    code.give(0)


def zero_where_assigned(gradient: Tensor, indices: Tensor) -> None:
    """Put 0 where the index is not below 0, in memory: float of its shape, contiguous.

    Example:
        >>> gradient = torch.tensor([1.0, 2.0])
        >>> zero_where_assigned(gradient, torch.tensor([-1, 0], dtype=torch.int32))
        >>> gradient.tolist()
        [1.0, 0.0]
    """
    native = (
        compiled_kernel(_write_free, 8 * indices.element_size(), vectorise=True) if on_processor(gradient) else None
    )
    if native is None:
        gradient.masked_fill_(indices >= 0, 0)
    else:
        parallel_for(native, thread_slices(gradient.numel()), [Sliced(gradient), Sliced(indices.contiguous())])


def _write_free(code: Code, item: int) -> None:
    gradient, indices = code.array(0, 32), code.array(1, item)
    count, place = code.number(2), code.variable(0)
    with code.loop(lambda: place.get() < count):
        at = place.get()
        gradient[at] = (indices[at] >> (item - 1)).choose(gradient[at], 0)
        place.set(at + 1)
    code.give(0)


def sum_by_index(terms: Tensor, indices: Tensor, codewords: int) -> Tensor:
    """Sum the terms of each index, in double precision where codewords are few.

    Args:
        terms: float, any shape.
        indices: int of that shape, from 0 to below ``codewords``.

    Returns:
        float[codewords].

    Example:
        >>> sum_by_index(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 0], dtype=torch.uint8), 3).tolist()
        [5.0, 0.0, 2.0]
    """
    # Each thread sums for itself: with many codewords it would take longer to add up what they found.
    few = codewords * _TERMS_FOR_EACH <= terms.numel()
    native = compiled_kernel(_write_sum, 8 * indices.element_size()) if few and on_processor(terms) else None
    if native is not None:
        # a gradient need not lie together: that of a sum is one number, seen as many
        terms, indices, cuts = terms.contiguous(), indices.contiguous(), thread_slices(terms.numel())
        sums = np.zeros((len(cuts), _APART + codewords, _LANES))
        own = [sums[number, _APART:].ctypes.data for number in range(len(cuts))]
        parallel_for(native, cuts, [Sliced(terms), Sliced(indices), own])
        return torch.from_numpy(sums.sum((0, 2))[_APART:]).float()
    total, terms, indices = terms.new_zeros(codewords), terms.reshape(-1), indices.reshape(-1)
    for block in cache_chunks(terms):
        total.index_add_(0, indices[block].int(), terms[block])
    return total


def _write_sum(code: Code, item: int) -> None:
    terms, indices, sums, count = code.array(0, 32), code.array(1, item), code.array(2, 64), code.number(3)
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
    def forward(ctx: Any, master: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(indices)
        write_codewords(master, codebook, indices)
        return master, master.new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, companion: Tensor) -> tuple[Tensor, None, None]:
        (indices,) = ctx.saved_tensors
        gradient = own(gradient, companion)
        zero_where_assigned(gradient, indices)
        return gradient, None, None


class _StraightThrough(Function):
    @staticmethod
    def forward(ctx: Any, master: Tensor, values: Tensor, indices: Tensor | None, units: CodebookScale) -> Tensor:
        codebook, ctx.order = units.codebook(values)
        codebook = codebook.view(-1)
        ctx.units, ctx.codewords, ctx.dtype = units, len(codebook), master.dtype
        # A large part of a step's memory: indices wait here for the backward pass, in a byte each where they fit.
        dtype = torch.uint8 if len(codebook) <= 256 else torch.int32
        if indices is None:
            kept = workspace(master.shape, dtype, master.device)
            weights = workspace(master.shape, codebook.dtype, master.device)
            NearestCodeword(codebook)(master, kept, weights)
        else:
            kept, weights = indices.to(dtype), gather_codewords(codebook, indices)
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


def frozen_lookup(master: Tensor, codebook: Tensor, indices: Tensor) -> Tensor:
    """Give ``codebook[indices]``, and the master weight where the index is -1: it alone has a gradient.

    The master weight itself takes these values, and its memory is what is given: nothing is copied. Whoever wants to
    keep the weights has to clone them, before an optimiser's step changes the master weight.

    Args:
        master: float, the trained dense weights; written to where the index is not -1.
        codebook: float32[K], without gradient.
        indices: int of the shape of ``master``.

    Example:
        >>> master = torch.tensor([0.4, 0.9], requires_grad=True)
        >>> frozen_lookup(master, torch.tensor([0.0, 1.0]), torch.tensor([-1, 1], dtype=torch.int32)).sum().backward()
        >>> master.grad.tolist()
        [1.0, 0.0]
    """
    result: Tensor = _FrozenLookup.apply(master, codebook, indices)[0]
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
    master: Tensor, values: Tensor, indices: Tensor | None = None, units: CodebookScale | None = None
) -> Tensor:
    """Give ``codebook[indices]`` while the gradient passes to the master weights unchanged, and to the codebook.

    Args:
        master: float, the trained dense weights.
        values: float32[K], the codebook as a group keeps it.
        indices: int of the shape of ``master``; None: the nearest codewords, in a codebook that ascends.
        units: how the codebook comes from ``values``; None: it is them.

    Example:
        >>> master = torch.tensor([0.4, 0.9], requires_grad=True)
        >>> straight_through(master, torch.tensor([0.0, 1.0]), torch.tensor([0, 1], dtype=torch.int32)).tolist()
        [0.0, 1.0]

    Reference: Bengio, Leonard, Courville, "Estimating or Propagating Gradients Through Stochastic Neurons", 2013.
    """
    # All in one: each function that autograd calls for each layer costs a step of a deep model about one percent.
    weights: Tensor = _StraightThrough.apply(master, values, indices, units or CodebookScale())
    return weights
