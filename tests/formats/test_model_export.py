"""A loaded dense model is an ordinary module: it exports and compiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from compressor import Compressor, Policy, Rule
from compressor.formats.loader import load


@pytest.fixture(scope="module", params=["test_resnet", "test_vit"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    torch.manual_seed(0)
    dense = timm.create_model(request.param, num_classes=10)
    job = Compressor(dense, Policy([Rule("*", scheme="kmeans", bits=4)]), model_args={"num_classes": 10}, teacher=None)
    path: Path = tmp_path_factory.mktemp("export") / "model.safetensors"
    job.prepare().finish().save(path)
    return load(path)


@pytest.fixture
def images(model: Any) -> Tensor:
    return torch.randn(2, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))


def test_export(model: nn.Module, images: Tensor) -> None:
    exported = torch.export.export(model, (images,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(images), model(images))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(model: nn.Module, images: Tensor, backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images))


def test_onnx(model: nn.Module, images: Tensor) -> None:
    reason = "needs the extra [onnx]"
    pytest.importorskip("onnxscript", reason=reason)
    reference = pytest.importorskip("onnx.reference", reason=reason)
    program = torch.onnx.export(model, (images,), dynamo=True, verbose=False)
    assert program is not None
    (logits,) = reference.ReferenceEvaluator(program.model_proto).run(None, {"x": images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-3, atol=1e-4)
