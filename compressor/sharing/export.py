"""What a scheme hands to the file half: shared tensors in canonical form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compressor.formats.codecs.bitpacking import take
from compressor.formats.content import Codebook, SharedTensor, Table, index_dtype
from compressor.formats.dtypes import FLOATS, round_to
from compressor.formats.torch_tensors import TORCH_DTYPES
from compressor.sharing.group_state import GroupState
from compressor.sharing.sites import Site

__all__ = ["DTYPE_NAMES", "SharedTensors", "export_scalars", "export_slices"]

DTYPE_NAMES = {TORCH_DTYPES[name]: name for name in FLOATS}
"""The safetensors name of each dtype that a shared tensor may have."""


@dataclass(frozen=True)
class SharedTensors:
    """What a scheme hands to the file half: books, and the tensors by name that refer to them by position."""

    books: tuple[Codebook, ...]
    tensors: Mapping[str, SharedTensor]


def export_scalars(
    group: GroupState, codebook: Tensor, indices: Mapping[Site, Tensor], scales: Mapping[Site, float] | None = None
) -> SharedTensors:
    """Bring a scalar codebook and its indices into canonical form: ascending, nothing twice, 0.0 where pruned.

    Args:
        codebook: float32[K].
        indices: int[shape] by site of ``group``, each in 0..K-1; any number where the weight is pruned.
        scales: what the codewords of a site are multiplied by.
    """
    codebook = codebook.detach().float()  # the model may have been moved to another dtype, codebooks and all
    if group.has_zeros:
        indices = {site: found.masked_fill(group.pruned(site), len(codebook)) for site, found in indices.items()}
        codebook = torch.cat([codebook, codebook.new_zeros(1)])
    masters = {site: group.master_weight(site) for site in indices}
    dtypes = {DTYPE_NAMES[master.dtype] for master in masters.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "F32"  # one dtype: the codebook needs no more digits than it
    given = Table.of(codebook.cpu().numpy(), dtype)
    values, position = np.unique(given.values.reshape(-1), return_inverse=True)
    renamed = np.empty(len(position), dtype=index_dtype(len(values)))
    renamed[np.argsort(codebook.cpu().numpy(), kind="stable")] = position
    tensors = {
        site.name: SharedTensor(
            shape=tuple(master.shape),
            book=0,
            indices=take(renamed, indices[site].detach().cpu().numpy().reshape(-1)),
            dtype=DTYPE_NAMES[master.dtype],
            scale=None if scales is None else np.array([scales[site]], np.float32),
        )
        for site, master in masters.items()
    }
    return SharedTensors((Table(values.reshape(1, -1, 1), dtype),), tensors)


def export_slices(group: GroupState, codebooks: Tensor, indices: Tensor) -> SharedTensors:
    """Bring the codebooks of the slices of a tensor's axis 0 into canonical form: ascending, 0.0 where pruned.

    Args:
        codebooks: float32[slices, K].
        indices: int[shape] of the group's one tensor, into its slice's codebook; any number where it is pruned.
    """
    (site,) = group.sites
    dtype, shape = DTYPE_NAMES[group.master_weight(site).dtype], tuple(indices.shape)
    codebooks = codebooks.detach().float()
    if group.has_zeros:
        indices = indices.masked_fill(group.pruned(site), codebooks.shape[1])
        codebooks = torch.cat([codebooks, codebooks.new_zeros(len(codebooks), 1)], dim=1)
    given = round_to(codebooks.cpu().numpy(), dtype) + np.float32(0)  # -0.0 becomes 0.0
    order = np.argsort(given, axis=1, kind="stable")
    position = np.argsort(order, axis=1).astype(index_dtype(given.shape[1]))
    renamed = np.take_along_axis(position, indices.cpu().numpy().reshape(len(given), -1), axis=1)
    table = Table(np.take_along_axis(given, order, axis=1)[:, :, None], dtype)
    return SharedTensors((table,), {site.name: SharedTensor(shape, 0, renamed.reshape(-1), dtype, axis=0)})
