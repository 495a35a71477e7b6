"""Weights by their indices: codewords put in, gradients summed, a pass each.

As machine code for float32 on a processor; elsewhere by the stock operators, to the same result.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from compressor.formats.jit.cache import compiled
from compressor.ops.buffer_pool import workspace
from compressor.ops.parallel import Along, parts, side_by_side

if TYPE_CHECKING:
    from compressor.formats.jit.builder import Code

__all__ = ["BLOCK", "blocks", "gather", "on_processor", "only_free", "settle", "sum_by_index"]

BLOCK = 1 << 15  # weights handled at a time, so that temporaries stay in cache
BLOCK_ELSEWHERE = 1 << 20  # than on a processor: there the launch of an operator costs more than what it does to fewer

_LANES = 4  # sums kept side by side, so that an addition need not wait for the last one to the same codeword
_TERMS_FOR_EACH = 64  # codeword, at least: with fewer the stock operator is as fast, and takes no memory
# Codewords before the sums of each thread: two that share a cache line wait for each other. And what an index of -1,
# which can come from a damaged state, is summed to is nobody's.
_APART = 8


def blocks(weights: Tensor) -> Iterator[slice]:
    """Cut a tensor of one dimension into runs, the first of them the longest."""
    block = BLOCK if weights.device.type == "cpu" else BLOCK_ELSEWHERE
    return (slice(start, start + block) for start in range(0, weights.numel(), block))


def gather(codebook: Tensor, indices: Tensor) -> Tensor:
    """Give ``codebook[indices]``, in memory that is used again; of an index below 0, any number.

    Args:
        codebook: float[K].
        indices: int, any shape, below K.

    Example:
        >>> gather(torch.tensor([1.0, 2.0]), torch.tensor([[0, 1, 1]], dtype=torch.uint8)).tolist()
        [[1.0, 2.0, 2.0]]
    """
    weights = workspace(indices.shape, codebook.dtype, codebook.device)
    if on_processor(weights):
        settle(weights, codebook, indices)
    else:
        torch.index_select(codebook, 0, indices.reshape(-1).int(), out=weights.view(-1))
    return weights


def settle(weights: Tensor, codebook: Tensor, indices: Tensor) -> None:
    """Put the codeword of each index in the weight's place, in memory; where the index is below 0 the weight stays.

    Autograd does not see it: weights that have settled and did not move since are written as they are.

    Args:
        weights: float, any shape.
        codebook: float32[K].
        indices: int of that shape, below K.

    Example:
        >>> weights = torch.tensor([1.0, 2.0])
        >>> settle(weights, torch.tensor([4.0]), torch.tensor([-1, 0], dtype=torch.int32))
        >>> weights.tolist()
        [1.0, 4.0]
    """
    indices = indices if indices.dtype.is_signed else indices.short()  # a first bit that is set is no sign there
    write = _write_settled, 8 * indices.element_size()
    native = compiled(*write, vectorise=True) if on_processor(weights) and weights.is_contiguous() else None
    if native is None:
        here = weights.data  # with a count of changes of its own
        codewords = codebook.to(here.dtype).index_select(0, indices.clamp(min=0).reshape(-1).int()).view(here.shape)
        torch.where(indices < 0, here, codewords, out=here)
        return
    codebook, indices = codebook.float().contiguous(), indices.contiguous()
    side_by_side(native, parts(weights.numel()), [Along(weights), codebook, Along(indices)])


def _write_settled(code: Code, item: int) -> None:
    weights, codebook, indices = code.array(0, 32), code.array(1, 32), code.array(2, item)
    count, place = code.number(3), code.variable(0)
    with code.loop(lambda: place.get() < count):
        at = place.get()
        index = indices[at]
        is_free = index >> (item - 1)  # the sign
        weights[at] = is_free.choose(weights[at], codebook[is_free.choose(0, index)])  # bits: they are only copied
        place.set(at + 1)
    code.give(0)


def only_free(gradient: Tensor, indices: Tensor) -> None:
    """Put 0 where the index is not below 0, in memory: float of its shape, contiguous.

    Example:
        >>> gradient = torch.tensor([1.0, 2.0])
        >>> only_free(gradient, torch.tensor([-1, 0], dtype=torch.int32))
        >>> gradient.tolist()
        [1.0, 0.0]
    """
    native = compiled(_write_free, 8 * indices.element_size(), vectorise=True) if on_processor(gradient) else None
    if native is None:
        gradient.masked_fill_(indices >= 0, 0)
    else:
        side_by_side(native, parts(gradient.numel()), [Along(gradient), Along(indices.contiguous())])


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
    native = compiled(_write_sum, 8 * indices.element_size()) if few and on_processor(terms) else None
    if native is not None:
        # a gradient need not lie together: that of a sum is one number, seen as many
        terms, indices, cuts = terms.contiguous(), indices.contiguous(), parts(terms.numel())
        sums = np.zeros((len(cuts), _APART + codewords, _LANES))
        own = [sums[number, _APART:].ctypes.data for number in range(len(cuts))]
        side_by_side(native, cuts, [Along(terms), Along(indices), own])
        return torch.from_numpy(sums.sum((0, 2))[_APART:]).float()
    total, terms, indices = terms.new_zeros(codewords), terms.reshape(-1), indices.reshape(-1)
    for block in blocks(terms):
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


def on_processor(numbers: Tensor) -> bool:
    """Tell whether machine code can read these numbers: float32, in the memory of the processor."""
    return numbers.dtype == torch.float32 and numbers.device.type == "cpu"
