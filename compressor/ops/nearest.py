"""The assignment of weights to their nearest codewords, in one pass.

For float32 on a processor it is machine code, three to forty times as fast as the stock operators, which search by
halves and pass over the weights once for each step. Elsewhere these are used, and return the same indices.
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
    from compressor.formats.jit.builder import Code, MachineCode
    from compressor.formats.jit.values import Array, Real, Variable

__all__ = ["NearestCodeword", "bounds_between", "nearest", "nearest_by_row", "search_table", "write_search"]

CELLS = 4096  # of the table a codebook is searched by
FEW_CODEWORDS = 16  # up to so many, a weight is compared with all


class NearestCodeword:
    """Finds nearest codewords; a tie goes to the lower one.

    Where codewords are few, a weight is compared with all bounds between them, several weights at a time. Otherwise the
    range of the bounds is cut into equal cells, and the bounds below each cell are counted: a weight's cell mostly
    leaves one comparison to do, where a binary search has one for each bit and the processor mispredicts half of them.

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
            # Padded to 4, 8 or 16 codewords, so that fewer kernels are compiled; no weight is nearer to infinity.
            padding = max(4, 1 << (len(codebook) - 1).bit_length()) - len(codebook)
            padded = functional.pad(self._codebook, (0, padding), value=torch.inf) if padding else self._codebook
            self._tables = (padded,)
        else:
            self._tables = *search_table(bounds_between(self._codebook)), self._codebook

    def __call__(self, weights: Tensor, indices: Tensor, values: Tensor) -> None:
        """Writes index and value of the nearest codeword of each weight.

        Args:
            weights: float, any shape, finite.
            indices: uint8 or int32 of that shape, contiguous.
            values: of the codebook's dtype, of that shape, contiguous.
        """
        weights = weights.contiguous()
        if self._tables and on_processor(weights):
            arguments: list[Argument] = [Sliced(weights), *self._tables, Sliced(indices), Sliced(values)]
            parallel_for(self._kernel(8 * indices.element_size()), thread_slices(weights.numel()), arguments)
        else:
            self._search(weights.view(-1), indices.view(-1), values.view(-1))

    def _kernel(self, bits: int) -> MachineCode:
        codewords = len(self._tables[-1])
        if codewords <= FEW_CODEWORDS:
            kernel = compiled_kernel(_write_nearest_of_few, bits, codewords, vectorise=True)
        else:
            kernel = compiled_kernel(_write_nearest, bits)
        assert kernel is not None
        return kernel

    def _search(self, weights: Tensor, indices: Tensor, values: Tensor) -> None:
        """Does the same with the stock operators, for tensors of one dimension."""
        bounds = bounds_between(self._codebook)
        common = torch.promote_types(weights.dtype, bounds.dtype)
        for chunk in cache_chunks(weights):
            positions = torch.bucketize(weights[chunk].to(common), bounds.to(common), out_int32=True)
            torch.index_select(self._codebook, 0, positions, out=values[chunk])
            indices[chunk] = positions


def nearest(weights: Tensor, codebook: Tensor) -> Tensor:
    """Returns the index of the nearest codeword of each weight; a tie goes to the lower one.

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
    search = NearestCodeword(codebook)
    unused_values = torch.empty_like(flat[next(cache_chunks(flat), slice(0))], dtype=codebook.dtype)
    for chunk in cache_chunks(flat):
        positions = indices.view(-1)[chunk]
        search(flat[chunk], positions, unused_values[: len(positions)])
    return indices


def nearest_by_row(weights: Tensor, codebooks: Tensor, row: int) -> Tensor:
    """Returns the nearest codeword of each weight in the codebook of its row; a tie goes to the lower one.

    Args:
        weights: float32, any shape, finite.
        codebooks: float32[B, K], each ascending.
        row: the number of consecutive weights in C order that are a row, of which there are B, the last maybe shorter.

    Returns:
        int32 of the shape of ``weights``: positions in the codebooks laid one after the other.

    Example:
        >>> nearest_by_row(torch.tensor([[0.1, 0.9], [0.1, 7.0]]), torch.tensor([[0.0, 1.0], [0.0, 8.0]]), 2).tolist()
        [[0, 1], [2, 3]]
    """
    rows, codewords = codebooks.shape
    if rows == 1:
        return nearest(weights, codebooks[0])
    bounds = ((codebooks[:, 1:] + codebooks[:, :-1]) / 2).contiguous()
    flat = weights.reshape(-1)
    missing = rows * row - len(flat)
    filled = functional.pad(flat, (0, missing)) if missing else flat
    positions = torch.searchsorted(bounds, filled.view(rows, -1), out_int32=True)
    first = torch.arange(0, rows * codewords, codewords, dtype=torch.int32, device=positions.device)
    return (positions + first[:, None]).view(-1)[: len(flat)].view(weights.shape)


def bounds_between(codebook: Tensor) -> Tensor:
    """Returns the midpoints between codewords, float[K - 1], in the codebook's dtype, but at least float32."""
    exact = codebook.to(torch.promote_types(codebook.dtype, torch.float32))
    return (exact[1:] + exact[:-1]) / 2


def _write_nearest_of_few(code: Code, bits: int, codewords: int) -> None:
    """Builds the kernel that compares several weights at a time with every bound, for indices of so many bits."""
    weights, codebook, indices, values = code.array(0, 32), code.array(1, 32), code.array(2, bits), code.array(3, 32)
    count, place = code.number(4), code.variable(0)
    reals = [codebook.real(number) for number in range(codewords)]
    bounds = [(low + high) * 0.5 for low, high in itertools.pairwise(reals)]
    with code.loop(lambda: place.get() < count):
        weight = weights.real(place.get())
        index, value = code.real(0.0), reals[0]  # a real index, so that its additions share the comparisons' vectors
        for number, bound in enumerate(bounds):
            over = bound < weight
            index, value = (index + 1.0).where(over, index), reals[number + 1].where(over, value)
        indices[place.get()] = index.whole(codewords - 1)
        values.put(place.get(), value)
        place.set(place.get() + 1)
    code.give(0)


def search_table(bounds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the table that ``write_search`` searches.

    Args:
        bounds: float32[n], ascending, at least one, on the processor.

    Returns:
        The bounds and infinity, float32[n + 1]; the first bound and the cells per unit, float32[2]; the number of
        bounds below each cell, int32[CELLS].
    """
    kernel = compiled_kernel(_write_cells, 32)
    assert kernel is not None
    ends = torch.cat([bounds, bounds.new_full((1,), torch.inf)])
    per_unit = CELLS / (bounds[-1] - bounds[0]).abs()  # zeros of both signs differ by -0.0: it has to be +infinity
    table = ends, torch.stack([bounds[0], per_unit]), torch.empty(CELLS, dtype=torch.int32, device="cpu")
    kernel(*[tensor.data_ptr() for tensor in table], len(bounds))
    return table


def _write_cells(code: Code, bits: int) -> None:
    """Builds the kernel that counts the bounds below each cell, in numbers of so many bits."""
    bounds, cut, below = code.array(0, 32), code.array(1, 32), code.array(2, bits)
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


def _write_nearest(code: Code, bits: int) -> None:
    """Builds the kernel that searches the codewords of weights one at a time, for indices of so many bits."""
    weights, bounds, cut, below, codebook = (code.array(position, 32) for position in range(5))
    indices, values, count = code.array(5, bits), code.array(6, 32), code.number(7)
    place, index = code.variable(0), code.variable(0)
    with code.loop(lambda: place.get() < count):
        write_search(code, index, weights.real(place.get()), (bounds, cut, below))
        indices[place.get()] = index.get()
        values[place.get()] = codebook[index.get()]
        place.set(place.get() + 1)
    code.give(0)


def write_search(code: Code, index: Variable, weight: Real, table: tuple[Array, Array, Array]) -> None:
    """Sets ``index`` to the number of bounds below ``weight``, by the table of ``search_table``."""
    bounds, cut, below = table
    # Rounding is monotone and the same for bounds and weights, so a bound in a lower cell is below the weight.
    least = below[((weight - cut.real(0)) * cut.real(1)).whole(CELLS - 1)]
    index.set(least + (bounds.real(least) < weight))
    with code.loop(lambda: bounds.real(index.get()) < weight):  # several bounds in one cell: rare
        index.set(index.get() + 1)
