"""Conversion of groups in training to plain weights: the values that the file will decode to."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from compressor.formats.content import Codebook, SharedTensor, decode
from compressor.sharing.group import Group
from compressor.sharing.sites import Site

__all__ = ["convert", "decode_tensor", "halvable", "halve_untouched", "holding_state", "set_state"]


def decode_tensor(tensor: SharedTensor, book: Codebook) -> Tensor:
    """Returns the dense values of a shared tensor, computed by the file's own decoder.

    Args:
        tensor: the shared tensor.
        book: its codebook.
    """
    weights = np.ascontiguousarray(decode(tensor, book))
    values = torch.from_numpy(weights.view(np.int16) if tensor.dtype == "BF16" else weights)
    return values.view(torch.bfloat16) if tensor.dtype == "BF16" else values


@torch.no_grad()
def convert(
    groups: Sequence[Group],
) -> tuple[dict[str, SharedTensor], tuple[Codebook, ...], dict[Site, Tensor]]:
    """Ends the last rounds of all groups and returns what they have learnt.

    Args:
        groups: the groups of the model.

    Returns:
        The shared tensors by name, their codebooks, and the values of every site as the file will decode them.
    """
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


def halvable(model: nn.Module, shared: Collection[str]) -> frozenset[str]:
    """Returns the names of the float32 tensors that are not shared, nor in a stack, and within the range of float16."""
    taken = {one for name in shared for one in name.split(" ")}
    return frozenset(
        name
        for name, tensor in model.state_dict().items()
        if name not in taken and tensor.dtype == torch.float32 and bool(torch.isfinite(tensor.half()).all())
    )


@torch.no_grad()
def set_state(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Gives tensors of a model's state other values, in place.

    Args:
        model: holds the tensors.
        values: by name.
    """
    state = model.state_dict()
    for name, value in values.items():
        state[name].copy_(value)


@contextmanager
def holding_state(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Does what ``set_state`` does inside, and restores the values at the end."""
    state = model.state_dict()
    before = {name: state[name].clone() for name in values}
    try:
        set_state(model, values)
        yield
    finally:
        set_state(model, before)


@torch.no_grad()
def halve_untouched(model: nn.Module, shared: Collection[str]) -> frozenset[str]:
    """Rounds the float32 tensors that are not shared to float16, in place, unless they exceed its range.

    Args:
        model: holds the tensors.
        shared: names of the tensors that are shared.

    Returns:
        The names of the tensors that float16 now represents exactly.
    """
    names, state = halvable(model, shared), model.state_dict()
    for name in names:
        state[name].copy_(state[name].half())
    return names
