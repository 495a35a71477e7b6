"""A model of OpenVINO keeps its indices packed: in the file, and in the compiled graph."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import compressor
from compressor import Compressor, Policy, Rule

for package in ("onnx", "onnxscript", "openvino"):
    pytest.importorskip(package, reason="needs the extra [openvino]")

SHAPE = 64, 48, 3, 3


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(48, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def large_constants(model: Any) -> list[str]:
    """Returns the types of what has as many entries as the weight."""
    found = []
    for operation in model.get_ops():
        info = operation.get_rt_info()
        kind = info["layerType"].value if "layerType" in info else operation.get_type_name()
        if kind in ("Const", "Constant") and math.prod(operation.get_output_shape(0)) == math.prod(SHAPE):
            found.append(operation.get_output_element_type(0).get_type_name())
    return found


@pytest.mark.parametrize(("bits", "kind"), [(3, "u4"), (8, "u8")])
def test_indices_stay_integers(bits: int, kind: str, tmp_path: Path) -> None:
    network, compiled = exported("kmeans", bits, tmp_path)
    assert large_constants(network) == [kind]
    assert large_constants(compiled) == ["u8"]  # four bits are bytes while it runs
    kinds = [operation.get_rt_info()["layerType"].value for operation in compiled.get_ops()]
    assert kinds.count("Gather") == 1


def test_scales_of_blocks_are_expanded_with_the_rest(tmp_path: Path) -> None:
    network, compiled = exported("uniform", 4, tmp_path)
    assert large_constants(network) == ["u4"]
    assert large_constants(compiled) == ["f32"]


def exported(scheme: str, bits: int, folder: Path) -> tuple[Any, Any]:
    """Returns the network as it was written, and as it is compiled."""
    import openvino

    packed = folder / "net.safetensors"
    job = Compressor(net(), Policy([Rule("*", scheme=scheme, bits=bits)]), teacher=None)
    job.prepare().finish().save(packed)
    done = compressor.export(packed, "openvino", model=net(), inputs=torch.randn(2, 48, 7, 7))
    network = openvino.Core().read_model(done.path)
    return network, openvino.compile_model(network, "CPU").get_runtime_model()
