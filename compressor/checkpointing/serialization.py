"""The state of a training as one file: tensors as safetensors, all else as JSON beside them; no pickle.

State dicts of modules, optimisers and schedules fit, and so do the states of random generators.
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

__all__ = ["broadcast_state", "checksum", "read_state", "write_state"]

KEY = "timm-compressor-state"
DTYPES = {**SAFETENSORS_NAMES, torch.complex64: "C64"}


def write_state(path: str | PathLike[str], state: Mapping[str, Any]) -> int:
    """Write a state, in place of the file that may be there, and give the file's size in bytes.

    Args:
        path: the file; it is the old one or the new one whole, whatever happens meanwhile.
        state: any nesting of dict, list and tuple with tensors, arrays, numbers, strings, booleans, dtypes and None.

    Raises:
        UsageError: something else is in it.
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
    """Read what ``write_state`` wrote; raises IntegrityError where the file is damaged, or is none of these."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})[KEY])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        if facts["crc32"] != _checksum(facts["state"], tensors):
            raise ValueError("its checksum differs")
        state: dict[str, Any] = _decode(json.loads(facts["state"]), tensors)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as exc:
        said = f"no {exc}" if isinstance(exc, KeyError) else " ".join(str(exc).split())
        raise IntegrityError(f"{Path(path)} is damaged, or holds no state of a training ({said[:100]})") from exc
    return state


def broadcast_state(read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Let the first of several processes read a state; give it in all, and raise in all what reading raises."""
    if world_size() == 1:
        return read()
    tensors: dict[str, Tensor] = {}

    def described() -> Any:
        text = _encode(read(), "", tensors)
        return text, {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}

    text, kinds = main_process_first(described)
    known = {str(dtype): dtype for dtype in DTYPES}
    for name, (dtype, shape) in kinds.items():
        tensors.setdefault(name, torch.empty(shape, dtype=known[dtype]))
    broadcast_tensors(tensors[name] for name in kinds)
    state: dict[str, Any] = _decode(text, tensors)
    return state


def checksum(tensors: Mapping[str, Tensor], start: int = 0) -> int:
    """Give one CRC-32 of all names and values, in the order of the names."""
    crc = start
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(_bytes(tensors[name].detach().cpu().contiguous()), crc)
    return crc


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> int:
    kinds = [f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}" for name in sorted(tensors)]
    return checksum(tensors, zlib.crc32("\n".join([text, *kinds]).encode()))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[bytes | memoryview]:
    """Give the parts of a safetensors file; the library would copy each tensor twice to give it whole."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that all are aligned
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name in order:
        tensor = tensors[name]
        end = start + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    return [framed(header), *(_bytes(tensors[name]) for name in order)]


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Give a value as JSON in which tensors are named; what JSON does not know is a table of one entry."""
    if isinstance(value, Tensor | np.ndarray) and (tensor := torch.as_tensor(value)).dtype in DTYPES:
        while name in tensors:  # {"a.b": ...} and {"a": {"b": ...}}
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
    ((kind, held),) = value.items()
    if kind == "tensor":
        return tensors[held]
    if kind == "dtype":
        return {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}[held]
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in held)
    return {_decode(key, tensors): _decode(item, tensors) for key, item in held}
