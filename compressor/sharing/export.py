"""The hand-over from a scheme to the file format: codebooks and indices in canonical form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressor.formats.codecs.bitpacking import take
from compressor.formats.content import Codebook, Grid, SharedTensor, Table, index_dtype
from compressor.formats.dtypes import FLOATS, round_to
from compressor.formats.torch_tensors import TORCH_DTYPES
from compressor.sharing.group_state import GroupState
from compressor.sharing.sites import Site

__all__ = ["DTYPE_NAMES", "SharedTensors", "export_codebook", "export_grid", "export_rows", "export_scalars"]

DTYPE_NAMES = {TORCH_DTYPES[name]: name for name in FLOATS}
"""The safetensors name of each dtype that a shared tensor may have."""


@dataclass(frozen=True)
class SharedTensors:
    """The codebooks of a group, and its tensors in terms of them.

    Args:
        books: the codebooks.
        tensors: by name; ``SharedTensor.book`` is a position in ``books``.
    """

    books: tuple[Codebook, ...]
    tensors: Mapping[str, SharedTensor]


def export_codebook(
    group: GroupState, codebook: Tensor, indices: Mapping[Site, Tensor], factors: Mapping[Site, Tensor] | None = None
) -> SharedTensors:
    """Returns tensors that share one codebook in canonical form.

    Canonical means: rounded to the dtype it is stored in, ascending, no codeword twice, and 0.0 among the values where
    weights are pruned.

    Args:
        group: the group of the sites; it is not changed.
        codebook: float[K, d], any order; vectors lie along the output channels, and no weight is pruned.
        indices: int[shape] by site of ``group``, each in 0..K-1; any number where the weight is pruned. Of vectors
            int[n], in the order of the file.
        factors: what the codewords of each site are multiplied by, numbers that bfloat16 has: float32, one, or one for
            each output channel; None: no factor.
    """
    codebook = codebook.detach().float()  # moving the model to another dtype moves the codebook too
    if group.has_zeros:
        indices = {site: index.masked_fill(group.pruned(site), len(codebook)) for site, index in indices.items()}
        codebook = torch.cat([codebook, codebook.new_zeros(1, 1)])
    masters = {site: group.master_weight(site) for site in indices}
    dtypes = {DTYPE_NAMES[master.dtype] for master in masters.values()}
    # Tensors of one dtype need no more digits than it has, unless they are multiplied.
    dtype = dtypes.pop() if len(dtypes) == 1 and factors is None else "F32"
    rounded = round_to(codebook.cpu().numpy(), dtype) + np.float32(0)  # -0.0 becomes 0.0
    values, new_index = np.unique(rounded, axis=0, return_inverse=True)
    new_index = new_index.reshape(-1).astype(index_dtype(len(values)))
    tensors = {
        site.name: SharedTensor(
            shape=tuple(master.shape),
            book=0,
            indices=take(new_index, indices[site].detach().cpu().numpy().reshape(-1)),
            dtype=DTYPE_NAMES[master.dtype],
            vector_axis=site.output_axis if codebook.shape[1] > 1 else 0,
            **({} if factors is None else _factor_fields(factors[site], site)),
        )
        for site, master in masters.items()
    }
    return SharedTensors((Table(values[None], dtype),), tensors)


def export_scalars(group: GroupState, codebook: Tensor, indices: Mapping[Site, Tensor]) -> SharedTensors:
    """Returns tensors that share one codebook of single weights, float[K]; otherwise as ``export_codebook``."""
    return export_codebook(group, codebook[:, None], indices)


def _factor_fields(factor: Tensor, site: Site) -> dict[str, Any]:
    """Returns the fields of a shared tensor that say what its codewords are multiplied by."""
    scale = factor.cpu().numpy().reshape(-1)
    return {"scale": scale, "scale_dtype": "BF16", "axis": site.output_axis if len(scale) > 1 else None}


def export_grid(group: GroupState, step: float, steps: Mapping[Site, Tensor]) -> SharedTensors:
    """Returns tensors whose weights are whole numbers of one step, with a grid each that ends where they end.

    Args:
        group: the group of the sites; it is not changed.
        step: above 0.
        steps: int[shape] by site of ``group``; any number where the weight is pruned.
    """
    books: list[Grid] = []
    tensors: dict[str, SharedTensor] = {}
    for site, numbers in steps.items():
        flat = numbers.masked_fill(group.pruned(site), 0).cpu().numpy().reshape(-1)
        least, most = int(flat.min(initial=0)), int(flat.max(initial=0))
        count, dtype = most - least + 1, DTYPE_NAMES[group.master_weight(site).dtype]
        indices = (flat - least).astype(index_dtype(count))
        tensors[site.name] = SharedTensor(tuple(numbers.shape), len(books), indices, dtype)
        books.append(Grid(least * step, step, count))
    return SharedTensors(tuple(books), tensors)


def export_rows(group: GroupState, codebooks: Tensor, positions: Tensor, row: int) -> SharedTensors:
    """Returns a tensor whose rows have a codebook each, in canonical form.

    Canonical means: rounded to the dtype of the tensor, ascending in each row, and 0.0 among the values where weights
    are pruned.

    Args:
        group: a group of one tensor; it is not changed.
        codebooks: float[rows, K], any order.
        positions: int[shape] in the codebooks laid one after the other; any number where the weight is pruned.
        row: the number of consecutive weights in C order that are a row; the last may be shorter.
    """
    (site,) = group.sites
    dtype, shape = DTYPE_NAMES[group.master_weight(site).dtype], tuple(positions.shape)
    indices = positions % codebooks.shape[1]
    codebooks = codebooks.detach().float()
    if group.has_zeros:
        indices = indices.masked_fill(group.pruned(site), codebooks.shape[1])
        codebooks = torch.cat([codebooks, codebooks.new_zeros(len(codebooks), 1)], dim=1)
    rounded = round_to(codebooks.cpu().numpy(), dtype) + np.float32(0)  # -0.0 becomes 0.0
    order = np.argsort(rounded, axis=1, kind="stable")
    new_index = np.argsort(order, axis=1).astype(index_dtype(rounded.shape[1]))
    flat = indices.cpu().numpy().reshape(-1)
    renumbered = new_index[np.arange(len(flat)) // row, flat]
    table = Table(np.take_along_axis(rounded, order, axis=1)[:, :, None], dtype)
    axis, block = (0, None) if row == math.prod(shape[1:]) else (None, row)
    return SharedTensors((table,), {site.name: SharedTensor(shape, 0, renumbered, dtype, axis, block)})
