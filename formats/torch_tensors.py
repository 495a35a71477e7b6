"""Packed files as torch tensors, decoded by several threads: the codecs' kernels release the interpreter lock."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressor.formats.content import Content, RawTensor, find_slices
from compressor.formats.dtypes import TORCH_NAMES
from compressor.formats.errors import MissingError, did_you_mean
from compressor.formats.file.reader import PackedFile

__all__ = ["SAFETENSORS_NAMES", "TORCH_DTYPES", "load_state_dict", "raw_tensor", "read_tensors", "stored_shapes"]

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, attribute) for name, attribute in TORCH_NAMES.items()}
"""torch's dtype of each safetensors name."""

SAFETENSORS_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
"""The safetensors name of each of torch's dtypes that a packed file can hold."""


def load_state_dict(
    path: str | os.PathLike[str], names: Iterable[str] | None = None, max_memory: int | None = None
) -> dict[str, Tensor]:
    """Returns tensors of a packed file by name; only these are read and decoded.

    Args:
        path: the file, as for ``load``.
        names: names of the tensors; None, the default, for all. An alias is the same tensor object as the tensor it
            is tied to.
        max_memory: the most bytes that all tensors of the file may take, for a file you trust; None, the default, for
            what is believable for the size of the file: 256 MiB or 1,000 times that size, whichever is more.

    Returns:
        Tensors on the CPU in the shapes and dtypes of the model, in the order of ``names``.

    Raises:
        MissingError: the file, or a name in it, does not exist.
        FileError: the file is damaged, hostile or of another kind, or its tensors take more than ``max_memory``.
    """
    with PackedFile.open(path, max_memory) as file:
        return read_tensors(file, names)


def read_tensors(file: PackedFile, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Returns tensors of an open file by name, as ``load_state_dict`` does."""
    sources = {name: name for name in file.slices} | dict(file.aliases)
    wanted = list(sources if names is None else names)
    for name in wanted:
        if name not in sources:
            raise MissingError(f"{file.label}: no tensor {name!r}.{did_you_mean(name, sources)}")
    stored = {name: file.slices[name] for name in dict.fromkeys(sources[name] for name in wanted)}
    # Largest first, so that all threads finish at about the same time.
    order = sorted({holder for holder, _ in stored.values()}, key=lambda holder: (-_weights(file, holder), holder))
    threads = ThreadPoolExecutor(torch.get_num_threads())
    try:
        futures = {holder: threads.submit(_tensor, file, holder) for holder in order}
        decoded = {name: _slice(futures[holder].result(), place) for name, (holder, place) in stored.items()}
        return {name: decoded[sources[name]] for name in wanted}
    finally:  # after a failure the tensors that are still queued are not decoded
        threads.shutdown(cancel_futures=True)


def stored_shapes(file: Content | PackedFile) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each stored tensor by name, without aliases."""
    entries: dict[str, Any] = {**file.sites, **file.untouched}
    slices = find_slices(file).items()
    return {name: entries[holder].shape[0 if place is None else 1 :] for name, (holder, place) in slices}


def _weights(file: PackedFile, holder: str) -> int:
    return math.prod((file.sites[holder] if holder in file.sites else file.untouched[holder]).shape)


def _slice(tensor: Tensor, place: int | None) -> Tensor:
    return tensor if place is None else tensor[place].clone()  # in memory of its own, like all others


def _tensor(file: PackedFile, holder: str) -> Tensor:
    if holder not in file.sites:
        return raw_tensor(file.raw(holder))
    weights = torch.from_numpy(file.tensor(holder))
    return weights.view(torch.bfloat16) if file.sites[holder].dtype == "BF16" else weights


def raw_tensor(raw: RawTensor) -> Tensor:
    """Returns an untouched tensor as a tensor of torch, in memory of its own."""
    if not raw.data:
        return torch.empty(raw.shape, dtype=TORCH_DTYPES[raw.dtype])
    data = torch.from_numpy(np.frombuffer(raw.data, np.uint8).copy())
    return data.view(TORCH_DTYPES[raw.dtype]).reshape(raw.shape)
