"""The state of a training run as one file: tensors as safetensors, everything else as JSON beside them; no pickle.

State dicts of modules, optimisers and schedules can be stored, and so can the states of random generators.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from compressor.distributed.collectives import broadcast_tensors, main_process_first, world_size
from compressor.formats.errors import IntegrityError, UsageError
from compressor.formats.file.container import framed
from compressor.formats.io.atomic import write_atomically
from compressor.formats.torch_tensors import SAFETENSORS_NAMES

__all__ = ["DAMAGE_ERRORS", "broadcast_state", "checksum", "read_checked", "read_state", "write_state"]

KEY = "timm-compressor-state"
DTYPES = {**SAFETENSORS_NAMES, torch.complex64: "C64"}
DAMAGE_ERRORS = (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError)
"""What reading a damaged file may raise."""


def write_state(path: str | PathLike[str], state: Mapping[str, Any]) -> int:
    """Writes a state, replacing an existing file, and returns the file's size in bytes.

    Args:
        path: the file; at any time it is either the old one or the new one, complete.
        state: any nesting of dict, list and tuple with tensors, arrays, numbers, strings, booleans, dtypes and None.

    Raises:
        UsageError: the state contains anything else.
        ResourceError: folder, disk or permissions do not allow it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = write_state(f"{folder}/state", {"steps": 3, "betas": (0.9, 0.5), "sums": {7: torch.ones(2)}})
        ...     read_state(f"{folder}/state")
        {'steps': 3, 'betas': (0.9, 0.5), 'sums': {7: tensor([1., 1.])}}
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_encode(state, "", tensors), separators=(",", ":"))
    facts = {"crc32": _checksum(text, tensors), "state": text}
    parts = _safetensors(tensors, {KEY: json.dumps(facts)})
    write_atomically(path, parts, force=True)
    return sum(map(len, parts))


def read_state(path: str | PathLike[str]) -> dict[str, Any]:
    """Reads what ``write_state`` wrote.

    Raises:
        IntegrityError: the file is damaged, or holds no such state.
    """
    try:
        facts, tensors = read_checked(path, KEY, lambda facts, tensors: _checksum(facts["state"], tensors))
        state: dict[str, Any] = _decode(json.loads(facts["state"]), tensors)
    except DAMAGE_ERRORS as exc:
        reason = f"no {exc}" if isinstance(exc, KeyError) else " ".join(str(exc).split())
        raise IntegrityError(f"{Path(path)} is damaged, or holds no state of a training ({reason[:100]})") from exc
    return state


def read_checked(
    path: str | PathLike[str], key: str, compute_checksum: Callable[[Mapping[str, Any], Mapping[str, Tensor]], int]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads the tensors of a safetensors file and the JSON facts in its metadata, and compares their checksum.

    Args:
        path: the file.
        key: the metadata entry that holds the facts; among them is ``crc32``, the expected checksum.
        compute_checksum: returns the checksum of facts and tensors.

    Returns:
        The facts, and the tensors by name.

    Raises:
        DAMAGE_ERRORS: one of these errors, if the file is damaged or not of this kind.
    """
    with safetensors.safe_open(path, "pt") as file:
        facts = json.loads((file.metadata() or {})[key])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    if facts["crc32"] != compute_checksum(facts, tensors):
        raise ValueError("its checksum differs")
    return facts, tensors


def broadcast_state(read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Reads a state in the first of several processes and returns it in all; an error of reading is raised in all.

    Args:
        read: returns the state; only called in the first process.
    """
    if world_size() == 1:
        return read()
    tensors: dict[str, Tensor] = {}

    def describe() -> Any:
        value = _encode(read(), "", tensors)
        return value, {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}

    value, types = main_process_first(describe)
    dtypes = {str(dtype): dtype for dtype in DTYPES}
    for name, (dtype, shape) in types.items():
        tensors.setdefault(name, torch.empty(shape, dtype=dtypes[dtype]))
    broadcast_tensors(tensors[name] for name in types)
    state: dict[str, Any] = _decode(value, tensors)
    return state


def checksum(tensors: Mapping[str, Tensor], start: int = 0) -> int:
    """Returns the CRC-32 of the names and values of tensors, in the order of the names.

    Args:
        tensors: the tensors by name.
        start: the CRC-32 to continue from.
    """
    crc = start
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(_bytes(tensors[name].detach().cpu().contiguous()), crc)
    return crc


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> int:
    types = [f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}" for name in sorted(tensors)]
    return checksum(tensors, zlib.crc32("\n".join([text, *types]).encode()))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[bytes | memoryview]:
    """Returns the parts of a safetensors file, because the library would copy each tensor twice to return it whole."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # wide types first, for alignment
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name in order:
        tensor = tensors[name]
        end = start + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    return [framed(header), *(_bytes(tensors[name]) for name in order)]


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Returns a value as JSON with names in place of tensors; types that JSON lacks become objects of one entry."""
    if isinstance(value, Tensor | np.ndarray) and (tensor := torch.as_tensor(value)).dtype in DTYPES:
        while name in tensors:  # as for {"a.b": ..., "a": {"b": ...}}
            name += "'"
        tensors[name] = tensor.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[_encode(k, "", tensors), _encode(v, f"{name}.{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        items = [_encode(item, f"{name}.{number}", tensors) for number, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UsageError(f"state {name.lstrip('.')!r} is a {type(value).__name__}: it cannot be kept in a checkpoint")


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dtype":
        return {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}[content]
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    return {_decode(key, tensors): _decode(item, tensors) for key, item in content}
