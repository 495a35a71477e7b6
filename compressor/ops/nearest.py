"""The hash of weights to their nearest codewords, in one pass.

As machine code for float32 on a processor, three to forty times as fast as the stock operators, which search by halves
and pass over the weights once for each step. Elsewhere these are used, and find the same indices.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from compressor.formats.jit.cache import available, compiled_kernel
from compressor.ops.parallel import Argument, Sliced, cache_chunks, on_processor, parallel_for, thread_slices

if TYPE_CHECKING:
    from compressor.formats.jit.builder import Code
    from compressor.formats.jit.values import Array, Real, Variable

__all__ = ["NearestCodeword", "bounds_between", "nearest", "nearest_by_row", "search_table", "write_search"]

CELLS = 4096
FEW_CODEWORDS = 16  # codewords, with which a weight is compared one after the other


class NearestCodeword:
    """Finds nearest codewords; a tie goes to the lower one.

    Where codewords are few, a weight is compared with all bounds between them, several weights at a time. Else the
    range of the bounds is cut into equal cells, and the bounds below each are counted: a weight's cell mostly leaves
    one comparison to do, where a binary search has one for each bit and guesses half of them wrong.

    Args:
        codebook: float[K], ascending.

    Example:
        >>> indices, values = torch.empty(3, dtype=torch.uint8), torch.empty(3)
        >>> NearestCodeword(torch.tensor([-1.0, 0.0, 1.0]))(torch.tensor([-0.9, 0.5, 0.6]), indices, values)
        >>> indices.tolist(), values.tolist()
        ([0, 1, 2], [-1.0, 0.0, 1.0])
    """

    def __init__(self, codebook: Tensor) -> None:
        self._codebook = codebook.detach().contiguous()
        self._tables: tuple[Tensor, ...] = ()
        if not on_processor(codebook) or not available():
            return
        if len(codebook) <= FEW_CODEWORDS:
            # lengthened to 4, 8 or 16, so that there is less to compile; no weight is nearer to infinity
            more = max(4, 1 << (len(codebook) - 1).bit_length()) - len(codebook)
            self._tables = (functional.pad(self._codebook, (0, more), value=torch.inf) if more else self._codebook,)
        else:
            self._tables = *search_table(bounds_between(self._codebook)), self._codebook

    def __call__(self, weights: Tensor, indices: Tensor, values: Tensor) -> None:
        """Write index and value of the nearest codeword of each weight.

        Args:
            weights: float, any shape, finite.
            indices: uint8 or int32 of that shape, contiguous.
            values: of the codebook's dtype, of that shape, contiguous.
        """
        weights = weights.contiguous()
        if self._tables and on_processor(weights):
            item, codewords = 8 * indices.element_size(), len(self._tables[-1])
            few = codewords <= FEW_CODEWORDS
            native = (
                compiled_kernel(_write_nearest_of_few, item, codewords, vectorise=True)
                if few
                else compiled_kernel(_write_nearest, item)
            )
            assert native is not None
            arguments: list[Argument] = [Sliced(weights), *self._tables, Sliced(indices), Sliced(values)]
            parallel_for(native, thread_slices(weights.numel()), arguments)
            return
        weights, indices, values = weights.view(-1), indices.view(-1), values.view(-1)
        bounds = bounds_between(self._codebook)
        common = torch.promote_types(weights.dtype, bounds.dtype)
        for block in cache_chunks(weights):
            found = torch.bucketize(weights[block].to(common), bounds.to(common), out_int32=True)
            torch.index_select(self._codebook, 0, found, out=values[block])
            indices[block] = found


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
    find, values = (
        NearestCodeword(codebook),
        torch.empty_like(flat[next(cache_chunks(flat), slice(0))], dtype=codebook.dtype),
    )
    for block in cache_chunks(flat):
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


def bounds_between(codebook: Tensor) -> Tensor:
    """Give the middles between codewords, float[K - 1], of the codebook's dtype or float32."""
    exact = codebook.to(torch.promote_types(codebook.dtype, torch.float32))
    return (exact[1:] + exact[:-1]) / 2


def _write_nearest_of_few(code: Code, item: int, codewords: int) -> None:
    """Write the hash as a comparison with every bound, of many weights at a time."""
    weights, codebook, indices, values = code.array(0, 32), code.array(1, 32), code.array(2, item), code.array(3, 32)
    count, place = code.number(4), code.variable(0)
    known = [codebook.real(number) for number in range(codewords)]
    bounds = [(low + high) * 0.5 for low, high in itertools.pairwise(known)]
    with code.loop(lambda: place.get() < count):
        weight = weights.real(place.get())
        index, value = code.real(0.0), known[0]  # a real number, for its additions are done with the comparisons
        for number, bound in enumerate(bounds):
            over = bound < weight
            index, value = (index + 1.0).where(over, index), known[number + 1].where(over, value)
        indices[place.get()] = index.whole(codewords - 1)
        values.put(place.get(), value)
        place.set(place.get() + 1)
    code.give(0)


def search_table(bounds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Make what ``write_search`` takes: the bounds up to infinity; the first, and cells per unit; bounds below each.

    Args:
        bounds: float32[n], ascending, at least one, on the processor.
    """
    native = compiled_kernel(_write_cells, 32)
    assert native is not None
    ends = torch.cat([bounds, bounds.new_full((1,), torch.inf)])
    per_unit = CELLS / (bounds[-1] - bounds[0]).abs()  # zeros of both signs are apart by -0.0: it has to be +infinity
    table = ends, torch.stack([bounds[0], per_unit]), torch.empty(CELLS, dtype=torch.int32, device="cpu")
    native(*[tensor.data_ptr() for tensor in table], len(bounds))
    return table


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


def _write_nearest(code: Code, item: int) -> None:
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
    """Set ``index`` to the position of the codeword nearest to ``weight``, by the table of a ``NearestCodeword``."""
    bounds, cut, below = table
    # Rounding is monotone and the same for bounds and weights, so a bound in a lower cell is below the weight.
    least = below[((weight - cut.real(0)) * cut.real(1)).whole(CELLS - 1)]
    index.set(least + (bounds.real(least) < weight))
    with code.loop(lambda: bounds.real(index.get()) < weight):  # several bounds in one cell: rare
        index.set(index.get() + 1)
