"""Weights that are tied, oddly laid out, of every dtype, broken or degenerate, and checkpoints that are not such."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import compressor
from compressor import Compressor, Policy, Rule
from compressor.cli.main import run
from compressor.formats.content import Content, SharedTensor, Table
from compressor.formats.errors import MissingError, UsageError
from compressor.formats.file.reader import PackedFile
from compressor.formats.file.writer import pack
from tests.faults.test_damaged_files import Says, says

__all__ = ["says"]  # the fixture

MODEL = "test_resnet"
KMEANS = Policy([Rule("*", scheme="kmeans", bits=2)])
SHARE = ("--scheme", "kmeans", "--bits", "2")


class Holder(nn.Module):
    """A linear layer, and whatever else a state dict may hold."""

    def __init__(self, **buffers: Tensor) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)


def packed(model: nn.Module, policy: Policy = KMEANS) -> bytes:
    return Compressor(model, policy, teacher=None).prepare().finish().to_bytes()


def same_bits(one: Tensor, two: Tensor) -> bool:
    raw = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, two)]
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(*raw)


def saved(model: nn.Module, path: Path) -> dict[str, Tensor]:
    path.write_bytes(packed(model))
    return compressor.load_state_dict(path)


def test_views_of_one_storage_are_stored_separately(tmp_path: Path) -> None:
    """Only names for the very same tensor are tied: what shares part of its memory, or shows it otherwise, is not."""
    memory = torch.arange(12.0)
    views = {"whole": memory, "head": memory[:8], "tail": memory[4:], "turned": memory.view(3, 4).t(), "same": memory}
    state = saved(Holder(**views), tmp_path / "a")
    with PackedFile.open(tmp_path / "a") as file:
        assert dict(file.aliases) == {"same": "whole"}
    for name, view in views.items():
        assert same_bits(state[name], view)
    state["head"].zero_()
    assert torch.equal(state["whole"], memory)


def test_views_of_one_storage_are_named(caplog: pytest.LogCaptureFixture) -> None:
    memory = torch.arange(12.0)
    packed(Holder(whole=memory, tail=memory[4:], turned=memory.view(3, 4).t()[1:]))
    joined = ["whole and turned", "whole and tail"]
    expected = [f"{pair} lie in the same memory: each is stored for itself, no longer joined" for pair in joined]
    assert [record.message for record in caplog.records] == expected


def test_disjoint_views_of_one_storage_are_accepted(caplog: pytest.LogCaptureFixture) -> None:
    memory = torch.arange(12.0)
    model = Holder(one=memory[:4], two=memory[4:], three=memory[:4], none=memory[2:2])
    model.tied = model.fc.weight
    packed(model)
    packed(timm.create_model("test_vit"))
    assert not caplog.records


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda tensor: tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor,
    "transposed": lambda tensor: tensor.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda tensor: tensor.repeat_interleave(2, 0)[::2],
    "reversed twice": lambda tensor: tensor.flip(0).contiguous().flip(0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_does_not_change_the_file(layout: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8, 4), nn.BatchNorm1d(4))
    expected = packed(model)
    for parameter in model.parameters():
        parameter.data = LAYOUTS[layout](parameter.data)
    assert not all(parameter.is_contiguous() for parameter in model.parameters()) or layout == "reversed twice"
    assert packed(model) == expected


def test_arrays_of_any_layout_pack_alike() -> None:
    def content(lay: Callable[[Any], Any]) -> Content:
        indices = lay((np.arange(24) % 4).astype(np.uint8))
        values = lay(np.array([-1, 0, 1, 2], np.float32).reshape(1, 4, 1))
        scale = lay(np.array([1, 2, 3], np.float32))
        return Content({"a": SharedTensor((3, 8), 0, indices, axis=0, scale=scale)}, (Table(values),))

    expected = pack(content(np.ascontiguousarray))
    assert pack(content(np.asfortranarray)) == expected
    assert pack(content(lambda array: np.repeat(array, 2, -1)[..., ::2])) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    assert {tensor.dtype for tensor in saved(Holder().to(dtype), tmp_path / "a").values()} == {dtype}


def test_untouched_tensors_are_stored_unchanged(tmp_path: Path) -> None:
    kinds = [torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
    buffers = {str(kind).replace(".", "_"): torch.tensor([0, 1, 1], dtype=kind) for kind in kinds}
    state = saved(Holder(**buffers), tmp_path / "a")
    assert all(same_bits(state[name], buffer) for name, buffer in buffers.items())


def test_double_precision_is_not_shared(tmp_path: Path) -> None:
    """No record decodes to it: such a tensor is stored as it is, and the table says why."""
    model: Any = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].double()
    job = Compressor(model, KMEANS, teacher=None).prepare()
    assert {plan.site.name: plan.reason for plan in job.plans if not plan.scheme}["1.weight"].startswith(
        "holds torch.float64"
    )
    job.finish().save(tmp_path / "a")
    assert same_bits(compressor.load_state_dict(tmp_path / "a")["1.weight"], model[1].weight.detach())


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning", "ignore:TypedStorage:UserWarning")
@pytest.mark.parametrize("kind", ["complex", "sparse", "quantised"])
def test_tensors_that_cannot_be_stored_are_named(kind: str) -> None:
    odd = {
        "complex": lambda: torch.zeros(3, dtype=torch.complex64),
        "sparse": lambda: torch.eye(4).to_sparse(),
        "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    }[kind]()
    with pytest.raises(UsageError, match=r"^odd: a .* tensor cannot be packed; make it a dense one") as caught:
        packed(Holder(odd=odd))
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_meta_tensors_are_named() -> None:
    model = Holder(odd=torch.empty(3, device="meta"))
    with pytest.raises(UsageError, match=r"^odd: a meta tensor cannot be packed") as caught:
        packed(model)
    assert caught.value.exit_code == 2
    with pytest.raises(MissingError, match=r"^odd: a Holder on meta has no reset_parameters\(\): build"):
        Compressor(model, KMEANS, from_scratch=True).prepare()
    with pytest.raises(MissingError, match=r"^1\.odd: a Holder on meta"):
        Compressor(nn.Sequential(nn.Linear(16, 16), model), KMEANS, from_scratch=True).prepare()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_refused(says: Says, bad: float) -> None:
    """Refused before anything is written, by count and name; a rule leaves the tensor as it is, bit for bit."""
    state = timm.create_model(MODEL).state_dict()
    state["layer1.0.conv1.weight"][0, 0, 0, 1:] = bad
    save_file(state, "bad.safetensors")
    command = ("pack", MODEL, "--checkpoint-path", "bad.safetensors", "-o", "a.safetensors")
    assert run([*command, *SHARE]) == 4
    said = "layer1.0.conv1.weight: 2 of 9,216 weights are NaN or infinite, the first at"
    assert not Path("a.safetensors").exists()
    model = timm.create_model(MODEL)
    model.load_state_dict(state)
    with pytest.raises(MissingError, match=said):
        Compressor(model, KMEANS)
    job = Compressor(model, Policy([Rule.ignore("layer1.0.conv1"), Rule("*", scheme="kmeans", bits=2)]), teacher=None)
    job.prepare().finish().save("a.safetensors")
    assert same_bits(
        compressor.load_state_dict("a.safetensors")["layer1.0.conv1.weight"], state["layer1.0.conv1.weight"]
    )


def test_a_recipe_may_leave_a_non_finite_tensor_dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name: a switch that lets any of them through would hide what is broken."""
    monkeypatch.chdir(tmp_path)
    state = timm.create_model(MODEL).state_dict()
    state["layer1.0.conv1.weight"][0, 0, 0, 1:] = float("nan")
    save_file(state, "bad.safetensors")
    rules = ['match = "layer1.0.conv1"\nignore = true', 'match = "*"\nscheme = "kmeans"\nbits = 2']
    Path("r.toml").write_text("[[stage]]\nepochs = 0\n" + "".join(f"[[stage.rule]]\n{rule}\n" for rule in rules))
    command = ["pack", MODEL, "--checkpoint-path", "bad.safetensors", "-o", "a.safetensors"]
    assert run([*command, "--recipe", "r.toml"]) == 0
    found = compressor.load_state_dict("a.safetensors")
    assert same_bits(found["layer1.0.conv1.weight"], state["layer1.0.conv1.weight"])
    assert len(found["fc.weight"].unique()) <= 4


def test_tensors_of_no_or_one_entry(tmp_path: Path) -> None:
    buffers = {"none": torch.empty(0, 3), "one": torch.tensor(7.0), "flag": torch.tensor(True)}
    state = saved(Holder(**buffers), tmp_path / "a")
    assert all(same_bits(state[name], buffer) for name, buffer in buffers.items())


@pytest.mark.parametrize(("values", "used"), [([0.25], 1), ([-1.0, 0.5, 2.0], 3)])
def test_few_distinct_values_are_kept_exactly(tmp_path: Path, values: list[float], used: int) -> None:
    model = Holder()
    with torch.no_grad():
        model.fc.weight.copy_(torch.tensor(values).repeat(256)[:256].view(16, 16))
    assert same_bits(saved(model, tmp_path / "a")["fc.weight"], model.fc.weight.detach())
    with PackedFile.open(tmp_path / "a") as file:
        assert len(np.unique(file.indices("fc.weight"))) == used


def test_negative_tiny_and_huge_weights(tmp_path: Path) -> None:
    """No NaN, and more bits lose less."""
    for weights in (-torch.rand(256) - 1, torch.logspace(-38, 38, 256), torch.randn(256) * 1e-38):
        model = nn.Linear(16, 16, bias=False)
        with torch.no_grad():
            model.weight.copy_(weights.view(16, 16))
        errors = []
        for bits in (1, 2, 4, 6):
            (tmp_path / "a").write_bytes(packed(model, Policy([Rule("*", scheme="kmeans", bits=bits)])))
            found = compressor.load_state_dict(tmp_path / "a")["weight"]
            assert torch.isfinite(found).all()
            errors.append(float((found.double() - model.weight.detach().double()).square().sum()))
        assert errors == sorted(errors, reverse=True)
