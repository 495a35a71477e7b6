"""A Core ML package: palettes are operators of the program, it computes our logits, and changes are seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

import compressor
from compressor import Compressor, Policy, Rule
from compressor.deployment.packed_model import PackedModel
from compressor.deployment.registry import make_target
from compressor.formats.errors import UnsupportedError, UsageError
from compressor.formats.file.reader import PackedFile
from compressor.targets.coreml_program import read_palettes

pytest.importorskip("coremltools", reason="needs the extra [coreml]")

IMAGES = torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A convolution with its norm, and a layer that is added to positions which are computed from a parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.layer = nn.Conv2d(4, 64, 3), nn.BatchNorm2d(64), nn.Linear(64, 96)
        self.positions = nn.Parameter(torch.randn(1, 1, 4, 24))
        nn.init.normal_(self.norm.running_mean)  # type: ignore[arg-type]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        grid = F.interpolate(self.positions, (6, 16), mode="bicubic", antialias=True)  # which coremltools has not
        logits: torch.Tensor = self.layer(self.norm(self.conv(images)).relu().mean((2, 3))) + grid.reshape(1, 96)
        return logits


def packed(folder: Path, rule: Rule) -> Path:
    path = folder / "net.safetensors"
    Compressor(Net(), Policy([Rule.ignore("positions"), rule]), teacher=None).prepare().finish().save(path)
    return path


def run(package: Path, image: torch.Tensor) -> NDArray[Any]:
    """Computes the logits of a package of the nets of this file, operator by operator, as their definitions say."""
    import coremltools
    from coremltools.converters.mil.frontend.milproto.load import load

    data = package / "Data/com.apple.CoreML"
    spec = coremltools.utils.load_spec(str(data / "model.mlmodel"))
    program = load(spec, spec.specificationVersion, str(data / "weights"))
    (function,) = program.functions.values()
    values: dict[str, Any] = dict.fromkeys(function.inputs, image)
    for op in function.operations:
        given = {
            name: values[var.name] if var.name in values else torch.tensor(var.val)
            for name, var in op.inputs.items()
            if var is not None and (var.name in values or (var.val is not None and not isinstance(var.val, str)))
        }
        name = op.outputs[0].name
        if op.op_type in ("const", "constexpr_lut_to_sparse"):
            continue
        if op.op_type.startswith("constexpr_"):
            values[name] = torch.tensor(op.materialized_val_inference())
        elif op.op_type == "conv":
            values[name] = F.conv2d(given["x"], given["weight"], given["bias"])
        elif op.op_type == "batch_norm":
            mean, variance, gamma, beta = (given[each] for each in ("mean", "variance", "gamma", "beta"))
            values[name] = F.batch_norm(given["x"], mean, variance, gamma, beta, eps=float(given["epsilon"]))
        elif op.op_type == "relu":
            values[name] = given["x"].relu()
        elif op.op_type == "reduce_mean":
            values[name] = given["x"].mean(given["axes"].tolist(), keepdim=bool(given["keep_dims"]))
        elif op.op_type == "linear":
            values[name] = F.linear(given["x"], given["weight"], given["bias"])
        else:
            assert op.op_type == "add"
            values[name] = given["x"] + given["y"]
    logits: NDArray[Any] = values["logits"].numpy()
    return logits


@pytest.mark.parametrize(
    "rule",
    [
        Rule("*", scheme="kmeans", bits=4),
        pytest.param(Rule("*", scheme="kmeans", bits=2, channel_scale=True), marks=pytest.mark.slow),
        pytest.param(Rule("*", scheme="kmeans", bits=2, group_size=16), marks=pytest.mark.slow),
        pytest.param(Rule("*", scheme="kmeans", bits=2, vector=2), marks=pytest.mark.slow),
        Rule("*", scheme="kmeans", bits=2, sparsity=0.9),
    ],
    ids=["table", "scales", "groups", "vectors", "sparse"],
)
def test_the_program_computes_our_logits(rule: Rule, tmp_path: Path) -> None:
    path = packed(tmp_path, rule)
    done = compressor.export(path, "coreml", model=Net(), inputs=IMAGES)
    assert (done.difference, done.run, done.notes) == (0, False, ())
    assert len(read_palettes(done.path)) == 2
    with torch.no_grad():
        expected = compressor.load(path, Net())(IMAGES[:1])
    np.testing.assert_allclose(run(done.path, IMAGES[:1]), expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_half_rounds_tables_and_nothing_else(tmp_path: Path) -> None:
    path = packed(tmp_path, Rule("*", scheme="kmeans", bits=4))
    full = compressor.export(path, "coreml", tmp_path / "full.mlpackage", model=Net(), inputs=IMAGES)
    half = compressor.export(path, "coreml", tmp_path / "half.mlpackage", model=Net(), inputs=IMAGES, half=True)
    assert half.exported < full.exported
    assert half.notes == ("tables and all other constants are rounded to float16",)
    one, two = (sorted(read_palettes(done.path), key=lambda found: found.indices.size) for done in (full, half))
    for exact, rounded in zip(one, two, strict=True):
        np.testing.assert_array_equal(exact.indices, rounded.indices)
        np.testing.assert_array_equal(exact.table.astype(np.float16), rounded.table)


def test_a_program_with_another_table_or_index_is_seen(tmp_path: Path) -> None:
    path, target = packed(tmp_path, Rule("*", scheme="kmeans", bits=4)), make_target("coreml", {})
    done = compressor.export(path, "coreml", model=Net(), inputs=IMAGES)
    (weights,) = done.path.rglob("weight.bin")
    data = weights.read_bytes()
    with PackedFile.open(path) as file:
        model = PackedModel(file, path, Net(), IMAGES)
        assert target.difference({".mlpackage": done.path}, model) == 0
        tables = [file.book(site.book).expand().astype("<f4").tobytes() for site in file.sites.values()]
        for at in [data.index(table) for table in tables] + [data.index(tables[0]) - 200]:
            weights.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            assert target.difference({".mlpackage": done.path}, model) == float("inf")


def test_what_stays_dense_is_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, path = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64)), tmp_path / "net.safetensors"
    rules = [Rule("0", scheme="kmeans", codewords=300), Rule("1", scheme="kmeans", bits=4)]
    Compressor(module, Policy(rules), teacher=None).prepare().finish().save(path)
    done = compressor.export(path, "coreml", model=module, inputs=torch.randn(2, 64))
    assert done.notes == ("stored dense: 0.weight: 300 codewords, Core ML takes 256",)
    assert len(read_palettes(done.path)) == 1


def test_another_dtype_is_refused_before_the_work(tmp_path: Path) -> None:
    model, path = nn.Sequential(nn.Linear(64, 64)).half(), tmp_path / "model.safetensors"
    Compressor(model, Policy([Rule("*", scheme="kmeans", bits=2)]), teacher=None).prepare().finish().save(path)
    with pytest.raises(UnsupportedError, match="computes in float16, expected float32"):
        compressor.export(path, "coreml", model=model, inputs=torch.randn(2, 64, dtype=torch.float16))
    assert [each.name for each in tmp_path.iterdir()] == ["model.safetensors"]


def test_another_ending_is_refused(tmp_path: Path) -> None:
    path = packed(tmp_path, Rule("*", scheme="kmeans", bits=4))
    with pytest.raises(UsageError, match=r"expected '\.mlpackage': target 'coreml' writes a folder of that ending"):
        compressor.export(path, "coreml", tmp_path / "net", model=Net(), inputs=IMAGES)
