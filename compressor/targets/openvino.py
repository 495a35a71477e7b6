"""A model of OpenVINO's own format whose shared weights stay integers of four and eight bits while it computes."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from compressor.deployment.packed_model import PackedModel
from compressor.deployment.registry import register
from compressor.deployment.target import Target
from compressor.targets.onnx_lookup import Lookup
from compressor.targets.onnx_model import add_tensors, onnx_program

__all__ = ["OpenVino"]

_OPSET = 21  # OpenVINO reads no later types


@register
@dataclass(frozen=True)
class OpenVino(Target):
    """OpenVINO's .xml and .bin, whose indices stay integers in memory, too, where a tensor has one table."""

    id: ClassVar[str] = "openvino"
    suffix: ClassVar[str] = ".xml"
    companions: ClassVar[tuple[str, ...]] = (".bin",)
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "openvino")
    install: ClassVar[str] = "timm-compressor[openvino]"
    limits: ClassVar[str] = (
        "indices take 4 or 8 bits; tensors with scales, offsets, vectors or several tables are expanded when it is "
        "compiled; images have one size"
    )

    def build(self, model: PackedModel) -> dict[str, bytes]:
        """Returns the two files, for batches of any size."""
        import openvino

        program = onnx_program(model, add_tensors(Lookup(_OPSET, arithmetic=False), model.file))
        network = openvino.Core().read_model(program.SerializeToString(deterministic=True))
        _keep_indices(network)
        for number, operation in enumerate(network.get_ordered_ops()):
            if re.fullmatch(r"[A-Za-z]+_\d+", operation.get_friendly_name()):  # numbered since the process began
                operation.set_friendly_name(f"{operation.get_type_name()}_{number}")
        with tempfile.TemporaryDirectory() as folder:
            paths = {ending: Path(folder, f"net{ending}") for ending in (self.suffix, *self.companions)}
            openvino.save_model(network, paths[self.suffix], compress_to_fp16=False)
            return {ending: path.read_bytes() for ending, path in paths.items()}

    def difference(self, written: Mapping[str, Path], model: PackedModel) -> float:
        """Returns the difference of the logits that OpenVINO computes on the CPU in float32."""
        import numpy as np
        import openvino
        import torch

        core, (images, _) = openvino.Core(), model.compared
        weights = openvino.Tensor(np.frombuffer(written[".bin"].read_bytes(), np.uint8))
        network = core.read_model(written[self.suffix].read_bytes(), weights)
        compiled = core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return model.difference(torch.from_numpy(compiled(images.numpy())[0]))

    def usage(self, path: Path, packed: Path) -> str:
        """Returns the line of Python that gives the logits."""
        del packed
        return f'logits = openvino.compile_model({str(path)!r}, "CPU")(images)[0]'


def _keep_indices(network: Any) -> None:
    """Makes indices bytes where they are looked up at once: wider ones OpenVINO expands to weights as it compiles.

    With scales or offsets it would keep these expanded besides: then it is to expand all.
    """
    from openvino import opset13

    for gather in network.get_ordered_ops():
        if gather.get_type_name() != "Gather" or _users(gather) & {"Multiply", "Add"}:
            continue
        cast = gather.input_value(1).get_node()
        if cast.get_type_name() == "Convert" and cast.input_value(0).get_node().get_type_name() == "Constant":
            stored = cast.input_value(0)
            if stored.get_element_type().get_type_name() in ("u4", "u8"):
                octets = opset13.convert(stored.get_node(), "u8", name=f"{gather.get_friendly_name()}/octets")
                gather.input(1).replace_source_output(octets.output(0))


def _users(operation: Any) -> set[str]:
    """Returns the types of the operations that read what another gives."""
    return {reader.get_node().get_type_name() for reader in operation.output(0).get_target_inputs()}
