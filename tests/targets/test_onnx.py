"""An ONNX file: its bytes are those of the indices, its opset is the least, and --dense has no small integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import compressor
from compressor import Compressor, Policy, Rule
from compressor.deployment.registry import make_target
from compressor.formats.errors import UnsupportedError, UsageError
from compressor.formats.file.reader import PackedFile

onnx = pytest.importorskip("onnx", reason="needs the extra [onnx]")
pytest.importorskip("onnxscript", reason="needs the extra [onnx]")
pytest.importorskip("onnxruntime", reason="needs the extra [onnx]")

IMAGES = torch.randn(3, 4, 7, 7, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A convolution with its norm, and two layers whose weights are tied."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(4, 128, 3), nn.BatchNorm2d(128)
        self.one, self.two = nn.Linear(128, 128), nn.Linear(128, 128)
        self.two.weight = self.one.weight

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pooled = self.norm(self.conv(images)).relu().mean((2, 3))
        logits: torch.Tensor = self.two(self.one(pooled).relu())
        return logits


def packed(folder: Path, bits: int, **options: Any) -> Path:
    path = folder / f"{bits}.safetensors"
    job = Compressor(Net(), Policy([Rule("*", scheme="kmeans", bits=bits, **options)]), teacher=None)
    job.prepare().finish().save(path, codec="bits")
    return path


@pytest.mark.parametrize(("bits", "opset", "kind"), [(2, 25, "UINT2"), (3, 18, "UINT8"), (4, 21, "UINT4")])
def test_constants_take_what_the_codec_bits_takes(bits: int, opset: int, kind: str, tmp_path: Path) -> None:
    path = packed(tmp_path, bits)
    done = compressor.export(path, "onnx", model=Net(), inputs=IMAGES)
    model = onnx.load(done.path)
    onnx.checker.check_model(model)
    assert [entry.version for entry in model.opset_import] == [opset]
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    indices = [tensor for name, tensor in constants.items() if name.endswith("/indices")]
    assert len(indices) == 2  # those of the tied tensor once
    assert {tensor.data_type for tensor in indices} == {onnx.TensorProto.DataType.Value(kind)}
    with PackedFile.open(path) as file:
        sizes = file.sizes()
    stored = sum(len(tensor.raw_data) for tensor in constants.values())
    assert stored <= 1.1 * (sizes.indices + sizes.codebooks + sizes.untouched)


@pytest.mark.parametrize("opset", [17, 26, "18"])
def test_an_opset_out_of_range_is_refused(opset: object) -> None:
    with pytest.raises(UsageError, match=r"target 'onnx': opset .*, expected 18 to 25"):
        make_target("onnx", {"opset": opset})


def test_dense_has_floats_alone(tmp_path: Path) -> None:
    path = packed(tmp_path, 2)
    done = compressor.export(path, "onnx", model=Net(), inputs=IMAGES, dense=True)
    model = onnx.load(done.path)
    assert [entry.version for entry in model.opset_import] == [18]
    assert not [node.op_type for node in model.graph.node if node.op_type in ("Gather", "Cast")]
    assert done.exported > 0.9 * done.dense


class Positions(nn.Module):
    """Adds a bias that is looked up at fixed positions, and hides some, as windows of attention do."""

    places: torch.Tensor
    mask: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.table = nn.Linear(64, 50), nn.Parameter(torch.randn(300, 2))
        self.register_buffer("places", torch.randint(300, (50, 50)), persistent=False)
        self.register_buffer("mask", torch.where(torch.rand(50, 50) < 0.5, -100.0, 0.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.table[self.places.view(-1)].view(50, 50, 2).sum(2) + self.mask
        logits: torch.Tensor = self.layer(x) @ bias
        return logits


def test_what_a_model_looks_up_itself_is_not_expanded(tmp_path: Path) -> None:
    packed = tmp_path / "positions.safetensors"
    policy = Policy([Rule("layer", scheme="kmeans", bits=4), Rule.ignore("*")])
    Compressor(Positions(), policy, teacher=None).prepare().finish().save(packed)
    done = compressor.export(packed, "onnx", model=Positions(), inputs=torch.randn(2, 64))
    sizes = {tensor.name: len(tensor.raw_data) for tensor in onnx.load(done.path).graph.initializer}
    assert sizes["table"] == 300 * 2 * 4
    assert sizes["mask/packed/indices"] == -(-2500 // 8)
    (integers,) = (size for name, size in sizes.items() if "integers" in name)
    assert integers == 2500 * 2
    assert max(sizes.values()) == integers


def test_bfloat16_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = nn.Sequential(nn.Linear(64, 64)).bfloat16(), tmp_path / "model.safetensors"
    Compressor(model, Policy([Rule("*", scheme="kmeans", bits=2)]), teacher=None).prepare().finish().save(path)
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: pytest.fail("it was exported"))
    with pytest.raises(UnsupportedError, match="computes in bfloat16"):
        compressor.export(path, "onnx", model=model, inputs=torch.randn(2, 64, dtype=torch.bfloat16))
    assert [each.name for each in tmp_path.iterdir()] == ["model.safetensors"]
