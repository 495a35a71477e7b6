"""What an export refuses, before anything is built."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import compressor
from compressor.deployment.packed_model import PackedModel
from compressor.deployment.registry import REFUSED, TARGETS, make_target, register
from compressor.deployment.target import Target
from compressor.formats.errors import IntegrityError, MissingError, ResourceError, UnsupportedError, UsageError
from compressor.formats.file.reader import PackedFile
from tests.helpers.file_commands import pack_module, timm_file

__all__ = ["timm_file"]  # the fixture


@pytest.mark.parametrize("name", [*REFUSED, "GGUF", ".gguf"])
def test_a_format_without_tables_is_refused_with_what_to_do(name: str, timm_file: Path) -> None:
    with pytest.raises(UsageError, match=f"cannot be exported to '{name}': .*compress unpack FILE -o FOLDER"):
        compressor.export(timm_file, name)


def test_a_misspelt_target_is_told_the_nearest() -> None:
    name = sorted(TARGETS)[0]
    with pytest.raises(UsageError, match=f"no target '{name}z'. Did you mean '{name}'?"):
        make_target(f"{name}z", {})


@dataclass(frozen=True)
class Spy(Target):
    """Compares logits that a function of the test makes."""

    id: ClassVar[str] = "spy"
    suffix: ClassVar[str] = ".spy"
    packages: ClassVar[tuple[str, ...]] = ()
    install: ClassVar[str] = "spy[all]"
    limits: ClassVar[str] = "none"
    error: float = 0.0

    def build(self, model: PackedModel) -> dict[str, bytes]:
        return {self.suffix: b"text", **{ending: ending.encode() for ending in self.companions}}

    def difference(self, written: Mapping[str, Path], model: PackedModel) -> float:
        assert {ending: path.read_bytes() for ending, path in written.items()} == self.build(model)
        images, logits = model.compared
        assert not images.equal(model.inputs(2))
        return model.difference(logits + self.error * logits.abs().max())

    def usage(self, path: Path, packed: Path) -> str:
        return f"cat {path} {packed}"


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> type[Spy]:
    """Registers a target for one test."""
    TARGETS.built_in()
    monkeypatch.setattr(TARGETS, "_classes", dict(TARGETS._classes))
    return register(Spy)


def test_what_it_needs_is_named_with_the_command_that_installs_it(
    spy: type[Spy], timm_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spy, "packages", ("json", "absent_package"))
    with pytest.raises(MissingError, match=r"needs absent_package, .*python -m pip install 'spy\[all\]'"):
        compressor.export(timm_file, "spy", tmp_path / "out")


def test_rounding_is_accepted_and_more_is_not(spy: type[Spy], timm_file: Path, tmp_path: Path) -> None:
    done = compressor.export(timm_file, "spy", tmp_path / "out", error=5e-5)
    assert done.difference == pytest.approx(5e-5, rel=0.01)
    with pytest.raises(IntegrityError, match=r"differs by 0\.0002 of the largest logit"):
        compressor.export(timm_file, "spy", tmp_path / "worse", error=2e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_companions_are_written_with_it_or_not_at_all(
    spy: type[Spy], timm_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spy, "companions", (".one", ".two"))
    done = compressor.export(timm_file, "spy", tmp_path / "net.spy")
    files = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert files == {"net.spy": "text", "net.one": ".one", "net.two": ".two"}
    assert done.exported == sum(map(len, files.values()))
    (tmp_path / "net.spy").unlink()
    with pytest.raises(UsageError, match=r"net\.one exists"):
        compressor.export(timm_file, "spy", tmp_path / "net.spy")
    (tmp_path / "net.one").write_text("mine")
    with pytest.raises(IntegrityError):
        compressor.export(timm_file, "spy", tmp_path / "net.spy", force=True, error=1.0)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"net.one": "mine", "net.two": ".two"}


@pytest.mark.parametrize("name", ["net.one", "net", "net.spy.bak"])
def test_with_companions_another_ending_is_refused_before_the_work(
    spy: type[Spy], timm_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(spy, "companions", (".one", ".two"))
    monkeypatch.setattr(spy, "build", lambda self, model: pytest.fail("it was built"))
    with pytest.raises(UsageError, match=r"expected '\.spy': target 'spy' writes \.one and \.two beside it"):
        compressor.export(timm_file, "spy", tmp_path / name)
    assert not [*tmp_path.iterdir()]


def test_what_exists_is_replaced_only_where_asked_for(spy: type[Spy], timm_file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        compressor.export(timm_file, "spy", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"
    assert compressor.export(timm_file, "spy", tmp_path / "out", force=True).exported == 4
    with pytest.raises(ResourceError, match="does not exist"):
        compressor.export(timm_file, "spy", tmp_path / "no" / "out")


def test_by_default_it_is_beside_the_packed_file(spy: type[Spy], timm_file: Path, tmp_path: Path) -> None:
    packed = tmp_path / "net.safetensors"
    packed.write_bytes(timm_file.read_bytes())
    assert compressor.export(packed, "spy").path == tmp_path / "net.spy"


def test_a_module_of_ones_own_needs_inputs(spy: type[Spy], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, packed = nn.Sequential(nn.Linear(64, 64)), tmp_path / "own.safetensors"
    pack_module(packed, module)
    with pytest.raises(MissingError, match="names no timm model"):
        compressor.export(packed, "spy", tmp_path / "out")
    with pytest.raises(MissingError, match="pass inputs="):
        compressor.export(packed, "spy", tmp_path / "out", model=module)
    with pytest.raises(UsageError, match="a batch of 1, expected two or more"):
        compressor.export(packed, "spy", tmp_path / "out", model=module, inputs=torch.randn(1, 64))
    done = compressor.export(packed, "spy", tmp_path / "out", model=module, inputs=torch.randn(2, 64))
    assert done.difference == 0


def test_what_an_exporter_raises_is_one_line(
    spy: type[Spy], timm_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(self: Spy, model: PackedModel) -> dict[str, bytes]:
        raise RuntimeError("no such\noperator")

    monkeypatch.setattr(spy, "build", build)
    line = f"target 'spy' cannot take the model of {timm_file}: RuntimeError: no such operator"
    with pytest.raises(UnsupportedError, match=f"^{re.escape(line)}$"):
        compressor.export(timm_file, "spy", tmp_path / "out")
    assert not list(tmp_path.iterdir())


class Pair(nn.Linear):
    """Returns two tensors."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return super().forward(x), x


def test_a_model_without_logits_is_refused(spy: type[Spy], tmp_path: Path) -> None:
    packed = tmp_path / "pair.safetensors"
    pack_module(packed, Pair(64, 64))
    with pytest.raises(UnsupportedError, match="its model returns a tuple, expected a tensor of logits"):
        compressor.export(packed, "spy", tmp_path / "out", model=Pair(64, 64), inputs=torch.randn(2, 64))


def test_logits_of_half_precision_may_be_rounded_more(spy: type[Spy], tmp_path: Path) -> None:
    module, packed = nn.Sequential(nn.Linear(64, 64)).bfloat16(), tmp_path / "half.safetensors"
    pack_module(packed, module)
    options: dict[str, Any] = {"model": module, "inputs": torch.randn(2, 64).bfloat16()}
    assert compressor.export(packed, "spy", tmp_path / "out", error=0.01, **options).difference > 1e-3
    with pytest.raises(IntegrityError, match=r"expected at most 0\.0625"):
        compressor.export(packed, "spy", tmp_path / "worse", error=0.2, **options)


def test_images_have_the_size_that_the_file_names(timm_file: Path) -> None:
    with PackedFile.open(timm_file) as file:
        model = PackedModel(file, timm_file)
        assert model.inputs(3).shape == (3, 1, 160, 160)
        assert model.inputs(3).equal(model.inputs(3))
