"""The hand-over from a scheme to the file format: codebooks and indices in canonical form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compressor.formats.codecs.bitpacking import take
from compressor.formats.content import Codebook, Grid, SharedTensor, Table, index_dtype
from compressor.formats.dtypes import FLOATS, round_to
from compressor.formats.torch_tensors import TORCH_DTYPES
from compressor.sharing.group_state import GroupState
from compressor.sharing.sites import Site

__all__ = ["DTYPE_NAMES", "SharedTensors", "export_grid", "export_scalars", "export_slices"]

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


def export_scalars(
    group: GroupState, codebook: Tensor, indices: Mapping[Site, Tensor], scales: Mapping[Site, float] | None = None
) -> SharedTensors:
    """Returns tensors that share one scalar codebook in canonical form.

    Canonical means: rounded to the dtype it is stored in, ascending, no value twice, and 0.0 among the values where
    weights are pruned.

    Args:
        group: the group of the sites; it is not changed.
        codebook: float[K], any order.
        indices: int[shape] by site of ``group``, each in 0..K-1; any number where the weight is pruned.
        scales: the factor that the codewords of each site are multiplied by; None: no factor.
    """
    codebook = codebook.detach().float()  # moving the model to another dtype moves the codebook too
    if group.has_zeros:
        indices = {site: index.masked_fill(group.pruned(site), len(codebook)) for site, index in indices.items()}
        codebook = torch.cat([codebook, codebook.new_zeros(1)])
    masters = {site: group.master_weight(site) for site in indices}
    dtypes = {DTYPE_NAMES[master.dtype] for master in masters.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "F32"  # tensors of one dtype need no more digits than it has
    rounded = Table.of(codebook.cpu().numpy(), dtype).values
    values, rank = np.unique(rounded.reshape(-1), return_inverse=True)
    new_index = np.empty(len(rank), dtype=index_dtype(len(values)))
    new_index[np.argsort(codebook.cpu().numpy(), kind="stable")] = rank
    tensors = {
        site.name: SharedTensor(
            shape=tuple(master.shape),
            book=0,
            indices=take(new_index, indices[site].detach().cpu().numpy().reshape(-1)),
            dtype=DTYPE_NAMES[master.dtype],
            scale=None if scales is None else np.array([scales[site]], np.float32),
        )
        for site, master in masters.items()
    }
    return SharedTensors((Table(values.reshape(1, -1, 1), dtype),), tensors)


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


def export_slices(group: GroupState, codebooks: Tensor, indices: Tensor) -> SharedTensors:
    """Returns a tensor whose slices along axis 0 have a codebook each, in canonical form.

    Canonical means: rounded to the dtype of the tensor, ascending in each slice, and 0.0 among the values where weights
    are pruned.

    Args:
        group: a group of one tensor; it is not changed.
        codebooks: float[slices, K], any order.
        indices: int[shape] into the codebook of the entry's slice, 0..K-1; any number where the weight is pruned.
    """
    (site,) = group.sites
    dtype, shape = DTYPE_NAMES[group.master_weight(site).dtype], tuple(indices.shape)
    codebooks = codebooks.detach().float()
    if group.has_zeros:
        indices = indices.masked_fill(group.pruned(site), codebooks.shape[1])
        codebooks = torch.cat([codebooks, codebooks.new_zeros(len(codebooks), 1)], dim=1)
    rounded = round_to(codebooks.cpu().numpy(), dtype) + np.float32(0)  # -0.0 becomes 0.0
    order = np.argsort(rounded, axis=1, kind="stable")
    new_index = np.argsort(order, axis=1).astype(index_dtype(rounded.shape[1]))
    renumbered = np.take_along_axis(new_index, indices.cpu().numpy().reshape(len(rounded), -1), axis=1)
    table = Table(np.take_along_axis(rounded, order, axis=1)[:, :, None], dtype)
    return SharedTensors((table,), {site.name: SharedTensor(shape, 0, renumbered.reshape(-1), dtype, axis=0)})
