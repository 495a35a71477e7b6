"""Arm's Ethos-U: what its own coder makes of shared weights, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np
from numpy.typing import NDArray

from compressor.deployment.layer_sizes import Estimate, LayerEstimate
from compressor.deployment.packed_model import PackedModel
from compressor.deployment.registry import register
from compressor.deployment.target import Target
from compressor.formats.content import decode
from compressor.formats.dtypes import from_storage
from compressor.formats.errors import UnsupportedError
from compressor.formats.file.reader import PackedFile

__all__ = ["EthosU", "quantised"]

_LARGEST = 127  # of a symmetric int8
_BLOCK_DEPTH = 32  # output channels that are coded together; other depths change sizes by less than a hundredth


@register
@dataclass(frozen=True)
class EthosU(Target):
    """The bytes of each layer by the weight coder of Arm's Vela, for Ethos-U55-256: an estimate, not a file."""

    id: ClassVar[str] = "ethos-u"
    suffix: ClassVar[str] = ".tflite"
    writes: ClassVar[bool] = False
    packages: ClassVar[tuple[str, ...]] = ("ethosu",)
    install: ClassVar[str] = "timm-compressor[ethos-u]"
    limits: ClassVar[str] = (
        "no .tflite is written, --estimate gives sizes alone; of the shared weights of convolutions and linear layers, "
        "rounded to int8 with one scale a tensor; accuracy after rounding is not measured"
    )

    def estimate(self, file: PackedFile) -> Estimate:
        """Returns the coded size of every shared tensor of two or four dimensions."""
        layers = []
        for name, entry in file.sites.items():
            if len(entry.shape) in (2, 4) and " " not in name:
                layers.append(_layer(name, from_file(file, name)))
        return Estimate(self.id, layers, self.limits)

    def build(self, model: PackedModel) -> NoReturn:
        """Raises UnsupportedError: it is not written."""
        raise UnsupportedError(f"target {self.id!r} writes no .tflite: --estimate gives the bytes of each layer")

    def difference(self, written: Mapping[str, Path], model: PackedModel) -> NoReturn:
        """Raises UnsupportedError: nothing is written."""
        self.build(model)

    def usage(self, path: Path, packed: Path) -> str:
        """Returns the command that prints the estimate."""
        del path
        return f"compress export {packed} --to {self.id} --estimate"


def from_file(file: PackedFile, name: str) -> NDArray[np.float32]:
    """Returns the weights of a shared tensor, float32."""
    site = file.shared(name)
    weights = decode(site, file.book(site.book))
    return from_storage(weights.tobytes(), site.dtype).reshape(site.shape)


def quantised(weights: NDArray[np.float32], by_channel: bool = False) -> NDArray[np.int16]:
    """Returns weights as symmetric int8, by TensorFlow Lite's rules, in a type that the coder takes.

    ``round(w / s)``, where ``s`` is the largest absolute weight over 127: of the tensor, so that equal weights stay
    equal and there are no more values than before; or of each output channel.

    Args:
        weights: float32, output channels first.
        by_channel: whether each output channel has its own scale.

    Example:
        >>> quantised(np.array([[0.5, -1.0], [0.5, 0.25]], np.float32)).tolist()
        [[64, -127], [64, 32]]
        >>> quantised(np.array([[0.5, -1.0], [0.5, 0.25]], np.float32), by_channel=True).tolist()
        [[64, -127], [127, 64]]
    """
    axes = tuple(range(1, weights.ndim)) if by_channel else None
    largest = np.abs(weights).max(axis=axes, keepdims=True, initial=0).astype(np.float64)
    scale = np.where(largest > 0, largest / _LARGEST, 1)
    return np.rint(weights / scale).astype(np.int16)


def _layer(name: str, weights: NDArray[np.float32]) -> LayerEstimate:
    per_tensor, per_channel = (_coded(quantised(weights, by_channel)) for by_channel in (False, True))
    return LayerEstimate(name, weights.shape, weights.size, per_tensor, per_channel)


def _coded(weights: NDArray[np.int16]) -> int:
    """Returns the bytes of int8 weights, output channels first, by Vela's coder and in the order that Vela chooses."""
    from ethosu.vela.api import NpuAccelerator, NpuBlockTraversal, npu_encode_weights

    kernel = np.moveaxis(weights.reshape(*weights.shape[:2], *(weights.shape[2:] or (1, 1))), 1, -1)
    depth, size = kernel.shape[-1], kernel.shape[1] * kernel.shape[2]
    depthwise = depth == 1 and size > 1
    by_depth = depth / _rounded_up(depth, 32)
    by_kernel = depth / _rounded_up(depth, 8) * size / _rounded_up(size, 4)
    kernel_first = weights.ndim == 4 and not depthwise and (by_kernel >= by_depth or depth <= 8)
    order = NpuBlockTraversal.PART_KERNEL_FIRST if kernel_first else NpuBlockTraversal.DEPTH_FIRST
    options: dict[str, Any] = {"dilation_xy": (1, 1), "ifm_bitdepth": 8, "ofm_block_depth": _BLOCK_DEPTH}
    accelerator, kernel = NpuAccelerator.Ethos_U55_256, np.ascontiguousarray(kernel)
    coded = npu_encode_weights(accelerator, kernel, is_depthwise=depthwise, block_traversal=order, **options)
    return len(coded)


def _rounded_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
