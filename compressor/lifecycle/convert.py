"""From groups in training to plain weights: the values that the file will decode to."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from compressor.formats.content import Codebook, SharedTensor, decode
from compressor.sharing.group import Group
from compressor.sharing.sites import Site

__all__ = ["convert", "decode_tensor", "halve_untouched"]


def decode_tensor(tensor: SharedTensor, book: Codebook) -> Tensor:
    """Expand a shared tensor by the file's own decoder."""
    weights = np.ascontiguousarray(decode(tensor, book))
    found = torch.from_numpy(weights.view(np.int16) if tensor.dtype == "BF16" else weights)
    return found.view(torch.bfloat16) if tensor.dtype == "BF16" else found


@torch.no_grad()
def convert(
    groups: Sequence[Group],
) -> tuple[dict[str, SharedTensor], tuple[Codebook, ...], dict[Site, Tensor]]:
    """End the last rounds; give shared tensors, books, and every site's values: as the file will decode them."""
    tensors: dict[str, SharedTensor] = {}
    books: list[Codebook] = []
    values: dict[Site, Tensor] = {}
    for group in groups:
        group.on_step(1.0)
        shared = group.scheme.export(group)
        tensors |= {name: replace(one, book=one.book + len(books)) for name, one in shared.tensors.items()}
        books.extend(shared.books)
        for site in group.sites:
            tensor = tensors.get(site.name)
            values[site] = (
                decode_tensor(tensor, books[tensor.book]) if tensor else group.weight(site, group.master_weight(site))
            )
    return tensors, tuple(books), values


@torch.no_grad()
def halve_untouched(model: nn.Module, shared: Collection[str]) -> frozenset[str]:
    """Round the float32 tensors that are not shared to float16, in place; those beyond its range stay as they are.

    Returns:
        Names of the tensors that float16 now holds exactly.
    """
    names = set()
    for name, tensor in model.state_dict().items():
        if name not in shared and tensor.dtype == torch.float32 and bool(torch.isfinite(tensor.half()).all()):
            tensor.copy_(tensor.half())
            names.add(name)
    return frozenset(names)
