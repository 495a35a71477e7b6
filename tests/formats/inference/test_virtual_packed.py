"""Packed inference of hashed layers: values and a seed in memory, computed block by block."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compressor import Compressor, Policy, Rule, load
from compressor.formats.content import Content
from compressor.formats.file.writer import write
from compressor.formats.inference.virtual_weight import VirtualTensor, VirtualWeight
from tests.helpers.blocks import network, never_whole, source_of

__all__ = ["never_whole"]


def saved(path: Path, model: nn.Module, **settings: Any) -> Path:
    policy = Policy([Rule("*", scheme="hashed", **{"compression": 8, **settings})])
    Compressor(model, policy, teacher=None, from_scratch=True).prepare().finish().save(path / "net.safetensors")
    return path / "net.safetensors"


@pytest.mark.usefixtures("never_whole")
def test_packed_inference_holds_values_and_computes_block_by_block(tmp_path: Path) -> None:
    path = saved(tmp_path, network())
    packed = load(path, network(), weights="packed")
    weights = [module for module in packed.modules() if isinstance(module, VirtualWeight)]
    assert len(weights) == 4
    assert [len(one.codebook) for one in weights] == [41, 41, 960, 25]
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(packed(x), load(path, network())(x), rtol=1e-4, atol=1e-5)


def test_packed_inference_of_small_layers_gives_the_same_bits(tmp_path: Path) -> None:
    path, x = saved(tmp_path, network()), torch.randn(2, 3, 6, 6)
    dense, packed = load(path, network()), load(path, network(), weights="packed")
    assert torch.equal(packed(x), dense(x))
    assert torch.equal(copy.deepcopy(packed)(x), dense(x))
    assert torch.equal(packed.half()(x.half()), dense.half()(x.half()))
    assert packed.to("meta")(x.half().to("meta")).shape == (2, 5)


def test_a_layer_becomes_dense_again(tmp_path: Path) -> None:
    path, x = saved(tmp_path, network()), torch.randn(2, 3, 6, 6)
    dense, packed = load(path, network()), load(path, network(), weights="packed")
    layer = packed.get_submodule("5")
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer.weight) is Tensor
    assert torch.equal(layer.weight, dense.state_dict()["5.weight"])
    assert torch.equal(packed(x), dense(x))


def test_gradients_are_not_lost_where_torch_passes_its_overrides() -> None:
    weight = VirtualTensor(source_of((3, 4)), torch.zeros(10, requires_grad=True), torch.float32)
    with pytest.raises(TypeError, match=r"expand_weights\(\)"), torch.no_grad():
        torch.empty(0).set_(weight)  # type: ignore[call-overload]


def test_packed_inference_exports(tmp_path: Path) -> None:
    packed, x = load(saved(tmp_path, network()), network(), weights="packed"), torch.randn(2, 3, 6, 6)
    exported = torch.export.export(packed, (x,)).module()
    torch.testing.assert_close(exported(x), packed(x))


def test_packed_inference_keeps_the_stored_dtype(tmp_path: Path) -> None:
    path = saved(tmp_path, network().bfloat16())
    x = torch.randn(2, 3, 6, 6)
    dense, packed = load(path, network()), load(path, network(), weights="packed")
    assert torch.equal(packed(x), dense(x)), "rounded to bfloat16, then cast to float32"


def test_groups_and_vectors_are_expanded_as_ever(tmp_path: Path) -> None:
    """A file may say more of a generated tensor than a virtual weight can."""
    content = Compressor(
        network(), Policy([Rule("*", scheme="hashed", compression=64)]), teacher=None, from_scratch=True
    ).prepare().finish().content  # fmt: skip
    sites = {
        name: type(site)(**{**vars(site), "scale": torch.full((1,), 2.0).numpy()})
        for name, site in content.sites.items()
    }
    write(tmp_path / "scaled.safetensors", Content(sites, content.books, content.untouched))
    dense, packed = (load(tmp_path / "scaled.safetensors", network(), weights=how) for how in ("dense", "packed"))
    assert not any(isinstance(module, VirtualWeight) for module in packed.modules())
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(packed(x), dense(x))
