"""A ``.pt2`` file of ``torch.export``, which PyTorch runs without this package and without timm."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from compressor.deployment.packed_model import PackedModel
from compressor.deployment.registry import register
from compressor.deployment.target import Target

__all__ = ["Torch"]

_TRACES = {"stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node"}
"""What the program says of the source code it was made from: half of a small file, and paths of this machine."""


@register
@dataclass(frozen=True)
class Torch(Target):
    """A .pt2 file whose weights stay packed; PyTorch runs it without this package and without timm."""

    id: ClassVar[str] = "torch"
    suffix: ClassVar[str] = ".pt2"
    limits: ClassVar[str] = (
        "indices take whole bits, so a file coded to fewer grows; the program itself takes several hundred kilobytes, "
        "more than a small network gains; weights are expanded in every forward pass; images have one size"
    )

    def build(self, model: PackedModel) -> dict[str, bytes]:
        """Returns the program of the packed model, for batches of any size."""
        import torch

        from compressor.formats.inference.packed_weight import install, read_packed

        module = model.load()
        install(read_packed(model.file, module, virtual=False), module)
        program = torch.export.export(module, (model.inputs(2),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        program.example_inputs = None
        for node in program.graph.nodes:
            for key in _TRACES & node.meta.keys():
                del node.meta[key]
        written = io.BytesIO()
        torch.export.save(program, written)
        return {self.suffix: written.getvalue()}

    def difference(self, written: Mapping[str, Path], model: PackedModel) -> float:
        """Returns the difference of the logits of the program that is read back."""
        import torch

        images, _ = model.compared
        with open(written[self.suffix], "rb") as file, torch.no_grad():
            return model.difference(torch.export.load(file).module()(images))

    def usage(self, path: Path, packed: Path) -> str:
        """Returns the line of Python that gives the logits."""
        del packed
        return f"logits = torch.export.load({str(path)!r}).module()(images)"
