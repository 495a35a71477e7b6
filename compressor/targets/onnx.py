"""An ONNX file whose shared tensors stay tables and small integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from compressor.deployment.packed_model import PackedModel
from compressor.deployment.registry import register
from compressor.deployment.target import Target
from compressor.formats.errors import UnsupportedError, UsageError
from compressor.targets.onnx_lookup import HIGHEST, OPSET, Lookup
from compressor.targets.onnx_model import add_tensors, onnx_program

__all__ = ["Onnx"]


@register
@dataclass(frozen=True)
class Onnx(Target):
    """An ONNX file whose shared weights stay indices and tables, for ONNX Runtime and what reads its files.

    Args:
        dense: writes all weights as floats, for a runtime that is to find nothing but what PyTorch's exporter writes.
        opset: the highest that the runtime knows, 18 to 25; types that are newer are made up for by arithmetic.
    """

    id: ClassVar[str] = "onnx"
    suffix: ClassVar[str] = ".onnx"
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnxruntime")
    install: ClassVar[str] = "timm-compressor[onnx]"
    limits: ClassVar[str] = (
        "a smaller file, not a faster one: ONNX Runtime expands the weights when it loads them; indices take whole "
        "bits, and those that a codec generates are written out; images have one size"
    )

    dense: bool = False
    opset: int = HIGHEST

    def __post_init__(self) -> None:
        if not isinstance(self.opset, int) or not OPSET <= self.opset <= HIGHEST:
            raise UsageError(f"target 'onnx': opset {self.opset!r}, expected {OPSET} to {HIGHEST}")

    def build(self, model: PackedModel) -> dict[str, bytes]:
        """Returns the file, for batches of any size."""
        if str(model.inputs(2).dtype) == "torch.bfloat16":  # said before the work; the comparison would fail
            raise UnsupportedError(
                f"target 'onnx': the model of {model.path} computes in bfloat16, which ONNX Runtime's CPU provider "
                "does not: compress the model in float32"
            )
        lookup = Lookup() if self.dense else add_tensors(Lookup(self.opset), model.file)
        return {self.suffix: onnx_program(model, lookup).SerializeToString(deterministic=True)}

    def difference(self, written: Mapping[str, Path], model: PackedModel) -> float:
        """Returns the difference of ONNX Runtime's logits."""
        import onnxruntime
        import torch

        images, _ = model.compared
        session = onnxruntime.InferenceSession(written[self.suffix].read_bytes(), providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        return model.difference(torch.from_numpy(logits))

    def usage(self, path: Path, packed: Path) -> str:
        """Returns the line of Python that gives the logits."""
        del packed
        return f'onnxruntime.InferenceSession({str(path)!r}).run(None, {{"images": images}})'
