"""One Python file that reads packed files with numpy alone, for those who cannot install this package."""

from __future__ import annotations

import runpy
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

import compressor.formats
from compressor.deployment.packed_model import PackedModel
from compressor.deployment.registry import register
from compressor.deployment.target import Target
from compressor.formats.file.reader import PackedFile

__all__ = ["Reader"]

_SOURCE = "packed_reader.py"


@register
@dataclass(frozen=True)
class Reader(Target):
    """One Python file, to be sent with the packed one: it gives numpy arrays, and needs numpy alone."""

    id: ClassVar[str] = "reader"
    suffix: ClassVar[str] = ".py"
    tolerance: ClassVar[float] = 0.0
    limits: ClassVar[str] = (
        "goes with the packed file, and gives arrays, not a model; decoding in plain Python takes seconds for a "
        "million weights; codecs of other packages are not read"
    )

    def file_name(self, stem: str) -> str:
        """Returns a name that Python can import, the same for all packed files."""
        del stem
        return _SOURCE

    def build(self, model: PackedModel) -> dict[str, bytes]:
        """Returns the text of the reader, the same for all packed files."""
        del model
        return {self.suffix: resources.files(compressor.formats).joinpath(_SOURCE).read_bytes()}

    def difference(self, written: Mapping[str, Path], model: PackedModel) -> float:
        """Returns 0 where the file reads every tensor bit for bit, else infinity."""
        arrays = runpy.run_path(str(written[self.suffix]))["read"](str(model.path))
        expected = _arrays(model.file)
        alike = arrays.keys() == expected.keys() and all(_same(arrays[name], expected[name]) for name in expected)
        return 0.0 if alike else float("inf")

    def usage(self, path: Path, packed: Path) -> str:
        """Returns the command that writes all arrays as numpy's ``.npz``."""
        return shlex.join(["python", str(path), str(packed), f"{packed.stem}.npz"])


def _arrays(file: PackedFile) -> dict[str, NDArray[Any]]:
    """Returns all tensors by name, BF16 as float32 and 8-bit floats as bytes."""
    found: dict[str, NDArray[Any]] = {}
    for name, (holder, _) in file.slices.items():
        if holder in file.sites:
            found[name] = _widened(file.tensor(name), file.sites[holder].dtype)
        else:
            raw = file.raw(name)
            values = np.frombuffer(raw.data, _numpy_dtype(raw.dtype)).reshape(raw.shape)
            found[name] = _widened(values, raw.dtype)
    return {**found, **{alias: found[name] for alias, name in file.aliases.items()}}


def _numpy_dtype(dtype: str) -> np.dtype[Any]:
    """Returns numpy's dtype of a safetensors name; BF16 and 8-bit floats as unsigned integers of their size."""
    if dtype == "BOOL":
        return np.dtype(bool)
    if dtype.startswith("F8"):
        return np.dtype(np.uint8)
    if dtype == "BF16":
        return np.dtype(np.uint16)
    return np.dtype(f"{dtype[0].lower()}{int(dtype[1:]) // 8}")


def _widened(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    return (values.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else values


def _same(one: NDArray[Any], two: NDArray[Any]) -> bool:
    return one.dtype == two.dtype and one.shape == two.shape and one.tobytes() == two.tobytes()
