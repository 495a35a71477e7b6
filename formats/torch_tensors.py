"""The tensors of a packed file as torch's, decoded in threads: decoding lets go of the interpreter's lock."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from compressor.formats.content import Content, RawTensor
from compressor.formats.errors import MissingError, did_you_mean
from compressor.formats.file.reader import PackedFile

__all__ = ["STORED_AS", "load_state_dict", "read_tensors", "stored_shape"]

_TORCH = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn, "U16": torch.uint16, "I16": torch.int16, "F16": torch.float16,
    "BF16": torch.bfloat16, "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32,
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64,
}  # fmt: skip
STORED_AS = {dtype: name for name, dtype in _TORCH.items()}
"""What safetensors calls torch's dtypes."""


def load_state_dict(path: str | os.PathLike[str], names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Read tensors of a packed file; only what is asked for is read and decoded.

    Args:
        path: the file.
        names: the tensors wanted; None for all. An alias shares the tensor it stands for.

    Raises:
        MissingError: a name that the file has not.
        FileError: the file is damaged, hostile or of another kind.
    """
    with PackedFile.open(path) as file:
        return read_tensors(file, names)


def read_tensors(file: PackedFile, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Read tensors of an open file, as ``load_state_dict`` does."""
    sources = {name: name for name in (*file.sites, *file.untouched)} | dict(file.aliases)
    wanted = list(sources if names is None else names)
    for name in wanted:
        if name not in sources:
            raise MissingError(f"{file.label}: no tensor {name!r}.{did_you_mean(name, sources)}")
    # the largest first, so that the threads end together
    order = sorted({sources[name] for name in wanted}, key=lambda name: (-math.prod(stored_shape(file, name)), name))
    threads = ThreadPoolExecutor(torch.get_num_threads())
    try:
        rng_at_epoch_start = {name: threads.submit(_tensor, file, name) for name in order}
        return {name: rng_at_epoch_start[sources[name]].result() for name in wanted}
    finally:  # where one fails, the others are not begun
        threads.shutdown(cancel_futures=True)


def stored_shape(file: Content | PackedFile, name: str) -> tuple[int, ...]:
    """Give the shape of a tensor that is no alias."""
    return file.sites[name].shape if name in file.sites else file.untouched[name].shape


def _tensor(file: PackedFile, name: str) -> Tensor:
    if name not in file.sites:
        return _raw(file.raw(name))
    weights = torch.from_numpy(file.tensor(name))
    return weights.view(torch.bfloat16) if file.sites[name].dtype == "BF16" else weights


def _raw(raw: RawTensor) -> Tensor:
    if not raw.data:
        return torch.empty(raw.shape, dtype=_TORCH[raw.dtype])
    data = torch.from_numpy(np.frombuffer(raw.data, np.uint8).copy())
    return data.view(_TORCH[raw.dtype]).reshape(raw.shape)
