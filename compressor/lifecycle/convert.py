"""Conversion of groups in training to plain weights: the values that the file will decode to."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from compressor.formats.content import Codebook, SharedTensor, decode
from compressor.sharing.group import Group
from compressor.sharing.sites import Site

__all__ = ["convert", "decode_tensor", "halvable", "halve_untouched", "holding_state", "names_in", "set_state"]


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
    groups: Sequence[Group], in_place: bool = False
) -> tuple[dict[str, SharedTensor], tuple[Codebook, ...], dict[Site, Tensor]]:
    """Ends the last rounds of all groups and returns what they have learnt.

    Args:
        groups: the groups of the model.
        in_place: whether master weights get their values at once, so that those of all sites are not held twice.

    Returns:
        The shared tensors by name, their codebooks, and the values of every site as the file will decode them, except
        of those that have been set in place.
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
            tensor, master = tensors.get(site.name), group.master_weight(site)
            value = decode_tensor(tensor, books[tensor.book]) if tensor else group.weight(site, master)
            if in_place and not group.virtual:  # which has no memory
                master.copy_(value)
            else:
                values[site] = value
    return tensors, tuple(books), values


def names_in(entries: Iterable[str]) -> set[str]:
    """Returns the names of all tensors in entries of a file: a stack is named by its tensors, with blanks between."""
    return {name for entry in entries for name in entry.split(" ")}


def halvable(model: nn.Module, shared: Collection[str]) -> frozenset[str]:
    """Returns the names of the float32 tensors that are not shared, nor in a stack, and within the range of float16.

    Neither are tensors in the memory of one that is shared, such as those tied to it.
    """
    taken, state = names_in(shared), model.state_dict()
    places = {state[name].data_ptr() for name in taken}
    return frozenset(
        name
        for name, tensor in state.items()
        if tensor.dtype == torch.float32
        and not (name in taken or (tensor.numel() and tensor.data_ptr() in places))
        and bool(torch.isfinite(tensor.half()).all())
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
    """Does what ``set_state`` does inside, and restores the values at the end; ``values`` hold them meanwhile."""
    _swap(model, values)
    try:
        yield
    finally:
        _swap(model, values)


@torch.no_grad()
def _swap(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    state = model.state_dict()
    for name, value in values.items():
        held = state[name].clone()
        state[name].copy_(value)
        value.copy_(held)


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
