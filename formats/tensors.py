"""The tensors of a packed file as torch's, decoded in threads: decoding lets go of the interpreter's lock."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from compressor.formats.errors import MissingError, did_you_mean
from compressor.formats.reader import PackedFile
from compressor.formats.record import Content, RawTensor

__all__ = ["STORED_AS", "Tensors", "load_state_dict", "stored_shape"]

_TORCH = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn, "U16": torch.uint16, "I16": torch.int16, "F16": torch.float16,
    "BF16": torch.bfloat16, "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32,
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64,
}  # fmt: skip
STORED_AS = {dtype: name for name, dtype in _TORCH.items()}
"""What safetensors calls torch's dtypes."""

_AHEAD = 1 << 25  # numbers decoded, at most, before anyone knows that the model is the file's: it may be hostile


def load_state_dict(path: str | os.PathLike[str], names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Read tensors of a packed file; only what is asked for is read and decoded.

    Args:
        path: the file.
        names: the tensors wanted; None for all. An alias shares the tensor it stands for.

    Raises:
        MissingError: a name that the file has not.
        FileError: the file is damaged, hostile or of another kind.
    """
    with PackedFile.open(path) as file, Tensors(file) as tensors:
        return tensors.read(names)


class Tensors:
    """Decodes the tensors of an open file, each once; as a context it waits for what has begun.

    Args:
        file: stays open as long.
    """

    def __init__(self, file: PackedFile) -> None:
        self._file = file
        self._sources = {name: name for name in (*file.sites, *file.untouched)} | dict(file.aliases)
        self._threads = ThreadPoolExecutor(torch.get_num_threads())
        self._begun: dict[str, Future[Tensor]] = {}

    def __enter__(self) -> Tensors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(cancel_futures=True)

    def read_ahead(self) -> None:
        """Begin with the largest tensors, within bounds, while others have the interpreter's lock."""
        left = _AHEAD
        for name in self._largest_first((*self._file.sites, *self._file.untouched)):
            left -= math.prod(stored_shape(self._file, name))
            if left < 0:
                return
            self._begin(name)

    def read(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Give the tensors of these names, None for all, aliases too; raises MissingError for one it has not."""
        wanted = list(self._sources if names is None else names)
        for name in wanted:
            if name not in self._sources:
                raise MissingError(f"{self._file.label}: no tensor {name!r}.{did_you_mean(name, self._sources)}")
        for name in self._largest_first(self._sources[name] for name in wanted):  # so that the threads end together
            self._begin(name)
        return {name: self._begun[self._sources[name]].result() for name in wanted}

    def _largest_first(self, names: Iterable[str]) -> list[str]:
        return sorted(names, key=lambda name: math.prod(stored_shape(self._file, name)), reverse=True)

    def _begin(self, name: str) -> None:
        if name not in self._begun:
            self._begun[name] = self._threads.submit(_tensor, self._file, name)


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
