"""Sizes for each runtime: those of the exports, or why there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

import compressor.formats
from compressor.deployment import registry, sizes
from compressor.deployment.estimate import estimate
from compressor.deployment.registry import TARGETS
from compressor.formats.file.writer import write
from compressor.model_zoo import packed_path
from tests.helpers.file_commands import small


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(sizes, "TARGETS", {name: TARGETS[name] for name in names})


def test_a_size_is_that_of_the_file_and_what_cannot_be_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "reader", "onnx")
    monkeypatch.setattr(registry, "find_spec", lambda _: None)
    began: list[str] = []
    onnx, reader = sizes.runtime_sizes(packed_path("zoo:test_resnet-tiny"), on_target=began.append)
    assert reader.bytes == (Path(compressor.formats.__file__).parent / "packed_reader.py").stat().st_size
    assert (reader.target, reader.why_not, onnx.target, onnx.bytes) == ("reader", "", "onnx", None)
    assert "python -m pip install 'timm-compressor[onnx]'" in onnx.why_not
    assert began == ["reader"]


def test_a_model_that_a_target_cannot_take_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "torch")
    write(path := tmp_path / "a.safetensors", small())
    (torch,) = sizes.runtime_sizes(path)
    assert torch.bytes is None
    assert str(path) in torch.why_not
    assert list(tmp_path.iterdir()) == [path]


def test_every_target_is_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda _: None)
    write(path := tmp_path / "a.safetensors", small())
    assert [one.target for one in sizes.runtime_sizes(path)] == sorted(TARGETS)


def test_where_no_file_is_written_the_estimate_is_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ethosu", reason="needs the extra ethos-u")
    only(monkeypatch, "ethos-u")
    (found,) = sizes.runtime_sizes(path := packed_path("zoo:test_resnet-tiny"))
    layers = estimate(path, "ethos-u").layers
    assert found.bytes == sum(layer.per_tensor for layer in layers) > 0
    assert found.layers == [(layer.site, layer.uncoded, layer.per_tensor) for layer in layers]
