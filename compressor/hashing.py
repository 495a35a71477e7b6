"""The hash of weights to their nearest codewords and the sum of the gradients that a codeword gets, a pass each.

As machine code for float32 on a processor, three to forty times as fast as the stock operators, which search by halves
and pass over the weights once for each step. Elsewhere these are used, and find the same indices.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compressor.formats.compiled import compiled

if TYPE_CHECKING:
    from compressor.formats.native import Code
    from compressor.formats.operands import Array, Real, Variable

__all__ = ["BLOCK", "Hash", "blocks", "fixed_or_free", "on_processor", "sum_by_index", "write_search"]

CELLS = 4096
BLOCK = 1 << 15  # weights handled at a time, so that temporaries stay in cache
BLOCK_ELSEWHERE = 1 << 20  # than on a processor: there the launch of an operator costs more than what it does to fewer

_LANES = 4  # sums kept side by side, so that an addition need not wait for the last one to the same codeword


class Hash:
    """Finds nearest codewords; a tie goes to the lower one.

    The range of the bounds between codewords is cut into equal cells, and the bounds below each are counted: a weight's
    cell mostly leaves one comparison to do, where a binary search has one for each bit and guesses half of them wrong.

    Args:
        codebook: float[K], ascending.

    Example:
        >>> indices, values = torch.empty(3, dtype=torch.uint8), torch.empty(3)
        >>> Hash(torch.tensor([-1.0, 0.0, 1.0]))(torch.tensor([-0.9, 0.5, 0.6]), indices, values)
        >>> indices.tolist(), values.tolist()
        ([0, 1, 2], [-1.0, 0.0, 1.0])
    """

    def __init__(self, codebook: Tensor) -> None:
        self._codebook = codebook.detach().contiguous()
        exact = self._codebook.to(torch.promote_types(codebook.dtype, torch.float32))
        self._bounds = (exact[1:] + exact[:-1]) / 2
        self.table: tuple[Tensor, ...] = ()
        """Of use to ``write_search``: bounds up to infinity; the first, and cells per unit; bounds below each cell."""
        native = compiled(_write_cells, 32) if len(self._bounds) and on_processor(codebook) else None
        if native is not None:
            first, last = self._bounds[0], self._bounds[-1]
            ends = torch.cat([self._bounds, self._bounds.new_full((1,), torch.inf)])
            per_unit = CELLS / (last - first).abs()  # zeros of both signs are apart by -0.0: it has to be +infinity
            self.table = ends, torch.stack([first, per_unit]), torch.empty(CELLS, dtype=torch.int32)
            native(*[tensor.data_ptr() for tensor in self.table], len(self._bounds))

    def __call__(self, weights: Tensor, indices: Tensor, values: Tensor) -> None:
        """Write index and value of the nearest codeword of each weight.

        Args:
            weights: float[n], finite.
            indices: uint8 or int32 [n].
            values: of the codebook's dtype [n].
        """
        weights = weights.contiguous()
        if self.table and on_processor(weights):
            native = compiled(_write_hash, 8 * indices.element_size())
            assert native is not None
            held = (weights, *self.table, self._codebook, indices, values)
            native(*[tensor.data_ptr() for tensor in held], len(weights))
            return
        common = torch.promote_types(weights.dtype, self._bounds.dtype)
        for block in blocks(weights):
            found = torch.bucketize(weights[block].to(common), self._bounds.to(common), out_int32=True)
            torch.index_select(self._codebook, 0, found, out=values[block])
            indices[block] = found


def blocks(weights: Tensor) -> Iterator[slice]:
    """Cut a tensor of one dimension into runs, the first of them the longest."""
    block = BLOCK if weights.device.type == "cpu" else BLOCK_ELSEWHERE
    return (slice(start, start + block) for start in range(0, weights.numel(), block))


def _write_cells(code: Code, item: int) -> None:
    bounds, cut, below = code.array(0, 32), code.array(1, 32), code.array(2, item)
    count, number, cell = code.number(3), code.variable(0), code.variable(0)
    with code.loop(lambda: number.get() < count):
        last = ((bounds.real(number.get()) - cut.real(0)) * cut.real(1)).whole(CELLS - 1)
        with code.loop(lambda: cell.get() < last + 1):
            below[cell.get()] = number.get()
            cell.set(cell.get() + 1)
        number.set(number.get() + 1)
    with code.loop(lambda: cell.get() < CELLS):
        below[cell.get()] = count
        cell.set(cell.get() + 1)
    code.give(0)


def _write_hash(code: Code, item: int) -> None:
    weights, bounds, cut, below, codebook = (code.array(position, 32) for position in range(5))
    indices, values, count = code.array(5, item), code.array(6, 32), code.number(7)
    place, index = code.variable(0), code.variable(0)
    with code.loop(lambda: place.get() < count):
        write_search(code, index, weights.real(place.get()), (bounds, cut, below))
        indices[place.get()] = index.get()
        values[place.get()] = codebook[index.get()]
        place.set(place.get() + 1)
    code.give(0)


def write_search(code: Code, index: Variable, weight: Real, table: tuple[Array, Array, Array]) -> None:
    """Set ``index`` to the position of the codeword nearest to ``weight``, by the table of a ``Hash``."""
    bounds, cut, below = table
    # Rounding is monotone and the same for bounds and weights, so a bound in a lower cell is below the weight.
    least = below[((weight - cut.real(0)) * cut.real(1)).whole(CELLS - 1)]
    index.set(least + (bounds.real(least) < weight))
    with code.loop(lambda: bounds.real(index.get()) < weight):  # several bounds in one cell: rare
        index.set(index.get() + 1)


def fixed_or_free(free: Tensor, codebook: Tensor, indices: Tensor) -> Tensor:
    """Give the codeword of each index, or the number that is free where the index is below 0.

    Args:
        free: float, any shape.
        codebook: float32[K].
        indices: int8, int16 or int32 of that shape, below K.

    Returns:
        Of the shape and dtype of ``free``.

    Example:
        >>> indices = torch.tensor([-1, 0], dtype=torch.int32)
        >>> fixed_or_free(torch.tensor([1.0, 2.0]), torch.tensor([4.0]), indices).tolist()
        [1.0, 4.0]
    """
    native = compiled(_write_merge, 8 * indices.element_size()) if on_processor(free) else None
    if native is None:
        fixed = codebook.to(free.dtype).index_select(0, indices.clamp(min=0).reshape(-1).int()).view(free.shape)
        return torch.where(indices < 0, free, fixed)
    merged = torch.empty(free.shape)
    held = [tensor.contiguous() for tensor in (free, codebook, indices)]
    native(*[tensor.data_ptr() for tensor in (*held, merged)], free.numel())
    return merged


def _write_merge(code: Code, item: int) -> None:
    free, codebook, merged = (code.array(position, 32) for position in (0, 1, 3))
    indices = code.array(2, item)
    count, place = code.number(4), code.variable(0)
    with code.loop(lambda: place.get() < count):
        at = place.get()
        index = indices[at]
        is_free = index >> (item - 1)  # the sign
        merged[at] = is_free.choose(free[at], codebook[is_free.choose(0, index)])  # bits: they are only copied
        place.set(at + 1)
    code.give(0)


def sum_by_index(terms: Tensor, indices: Tensor, codewords: int) -> Tensor:
    """Sum the terms of each index, in double precision where that costs nothing.

    Args:
        terms: float[n].
        indices: int [n], from 0 to below ``codewords``.

    Returns:
        float[codewords].

    Example:
        >>> sum_by_index(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 0], dtype=torch.uint8), 3).tolist()
        [5.0, 0.0, 2.0]
    """
    native = compiled(_write_sum, 8 * indices.element_size()) if on_processor(terms) else None
    if native is not None:
        sums = torch.zeros(codewords, _LANES, dtype=torch.float64)
        # a gradient need not lie together: that of a sum is one number, seen as many
        terms, indices = terms.contiguous(), indices.contiguous()
        native(terms.data_ptr(), indices.data_ptr(), sums.data_ptr(), len(terms))
        return sums.sum(1).float()
    total = terms.new_zeros(codewords)
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
