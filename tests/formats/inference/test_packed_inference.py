"""Packed inference: expanded weights against the one decoder, logits against the dense model, memory."""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from compressor import Compressor, Policy, Rule
from compressor.formats.content import Content, Grid
from compressor.formats.errors import FileError, UsageError
from compressor.formats.file.reader import PackedFile
from compressor.formats.file.writer import write
from compressor.formats.inference.packed_weight import PackedWeight
from compressor.formats.loader import load, load_state_dict
from tests.formats.inference.test_packed_weight import record, table
from tests.formats.test_loader import to_content

MODELS = ["test_resnet", "test_efficientnet", "test_nfnet", "test_convnext", "test_vit"]


def saved(path: Path, name: str, **settings: Any) -> Path:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    policy = Policy([Rule("*", scheme="kmeans", **settings)])
    job = Compressor(model, policy, model_args={"num_classes": 10}, teacher=None).prepare()
    job.finish().save(path / f"{name}.safetensors")
    return path / f"{name}.safetensors"


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("modules"), "test_vit", bits=4)


def images(model: Any) -> Tensor:
    return torch.randn(1, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(1))


def packed_weights(model: nn.Module) -> list[PackedWeight]:
    return [module for module in model.modules() if isinstance(module, PackedWeight)]


# -- the expansion is the decoder's


# -- models


@pytest.mark.parametrize("settings", [{"bits": 4}, {"codewords": 3}], ids=["4 bits", "3 codewords"])
@pytest.mark.parametrize("name", MODELS)
def test_same_logits_in_a_fifth_of_the_memory(name: str, settings: dict[str, int], tmp_path: Path) -> None:
    path = saved(tmp_path, name, **settings)
    dense, packed = load(path), load(path, weights="packed")
    x = images(dense)
    with torch.inference_mode():
        assert torch.equal(packed(x), dense(x))
    with PackedFile.open(path) as file:
        shared = sum(tensor.nbytes for name, tensor in dense.named_parameters() if name in file.sites)
        left = sum(tensor.nbytes for name, tensor in packed.named_parameters() if name in file.sites)
    held = sum(tensor.nbytes for name, tensor in packed.named_buffers() if ".parametrizations." in name)
    assert left + held <= 0.2 * shared


def test_one_dense_weight_at_a_time(vit: Path) -> None:
    model = load(vit, weights="packed")
    made: list[weakref.ref[Tensor]] = []
    most = 0

    def watch(module: nn.Module, arguments: Any, weight: Tensor) -> None:
        nonlocal most
        made.append(weakref.ref(weight))
        most = max(most, sum(other() is not None for other in made))

    for weight in packed_weights(model):
        weight.register_forward_hook(watch)
    logits = model(images(model))  # gradients on, as a careless caller has them
    with pytest.raises(RuntimeError, match="does not require grad"):  # nothing to train
        logits.sum().backward()
    assert len(made) >= len(packed_weights(model)) > 10
    assert most == 1
    assert all(weight() is None for weight in made)


def test_deep_copies_share_nothing(vit: Path) -> None:
    model = load(vit, weights="packed")
    other = copy.deepcopy(model)
    assert torch.equal(model(images(model)), other(images(model)))
    packed_weights(model)[0].indices.zero_()
    assert not torch.equal(model(images(model)), other(images(model)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_to_another_dtype_rounds_as_the_dense_model_does(vit: Path, dtype: torch.dtype) -> None:
    dense, packed = load(vit).to(dtype), load(vit, weights="packed").to(dtype)
    for name, module in dense.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            weight = packed.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            assert weight.dtype == dtype
            assert torch.equal(weight, module.weight)


def test_to_another_device(vit: Path) -> None:
    model = load(vit, weights="packed").to("meta")
    assert model(images(model).to("meta")).shape == (1, 10)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_state_dict_holds_what_is_packed(vit: Path) -> None:
    model, other = load(vit, weights="packed"), load(vit, weights="packed")
    for weight in packed_weights(other):
        weight.indices.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images(model)), model(images(model)))
    assert sum(tensor.nbytes for tensor in model.state_dict().values()) < vit.stat().st_size * 1.5


class Every(nn.Module):
    """Each layer that can be packed, and one that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 24)
        self.decoder = nn.Linear(24, 40, bias=False)
        self.decoder.weight = self.embedding.weight
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.conv1 = nn.Conv1d(24, 24, 3, padding="same")
        self.conv2 = nn.Conv2d(1, 4, (3, 24))
        self.conv3 = nn.Conv3d(1, 4, 2, padding=1)
        self.memory = nn.LSTM(24, 24, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.attention(x, x, x)[0]
        x = x + self.conv1(x.mT).mT + self.memory(x)[0]
        x = x + self.conv2(x.unsqueeze(1)).mean() + self.conv3(x[:, None, None]).mean()
        decoded: Tensor = self.decoder(x)
        return decoded


@pytest.fixture
def every(tmp_path: Path) -> Path:
    content = to_content(Every())
    names = [name for name in content.sites if name != "decoder.weight"]  # tied: stored once
    sites = {name: replace(content.sites[name], book=number) for number, name in enumerate(names)}
    books = tuple(content.books[content.sites[name].book] for name in names)
    tied = {"decoder.weight": "embedding.weight"}
    write(tmp_path / "every.safetensors", Content(sites, books, content.untouched, tied))
    return tmp_path / "every.safetensors"


def test_every_kind_of_layer_and_a_tied_tensor(every: Path) -> None:
    dense, packed = load(every, Every()), load(every, Every(), weights="packed")
    tokens = torch.randint(40, (2, 7))
    with torch.inference_mode():
        assert torch.equal(packed(tokens), dense(tokens))
    assert isinstance(packed.get_parameter("memory.weight_ih_l0"), nn.Parameter)
    assert len(packed_weights(packed)) == 6  # embedding and decoder are one
    attention = load_state_dict(every)["attention.in_proj_weight"]
    assert torch.equal(packed.get_submodule("attention").in_proj_weight, attention)  # type: ignore[arg-type]


def test_what_would_not_shrink_stays_dense(tmp_path: Path) -> None:
    site = record((3, 5), Grid(-1.0, 2**-15, 1 << 16))
    write(tmp_path / "grid.safetensors", Content({"weight": site}, (Grid(-1.0, 2**-15, 1 << 16),)))
    model = load(tmp_path / "grid.safetensors", nn.Linear(5, 3, bias=False), weights="packed")
    assert not packed_weights(model)
    assert isinstance(model.weight, nn.Parameter)


def test_a_book_of_many_layers_is_held_once(tmp_path: Path) -> None:
    book = table(4)
    sites = {f"{name}.weight": record((16, 16), book) for name in (0, 1)}
    write(tmp_path / "wide.safetensors", Content(sites, (book,)))
    layers = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    first, second = packed_weights(load(tmp_path / "wide.safetensors", layers, weights="packed").half())
    assert first.codebook is second.codebook
    assert first.codebook.dtype == torch.float32


def test_damage_leaves_the_given_model_as_it_was(every: Path) -> None:
    data = bytearray(every.read_bytes())
    data[-200] ^= 1  # in the untouched tensors: read after the packed ones
    every.write_bytes(data)
    model = Every()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FileError):
        load(every, model, weights="packed")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_unknown_mode(vit: Path) -> None:
    with pytest.raises(UsageError, match=r"weights='pakced', expected 'dense' or 'packed'. Did you mean 'packed'\?"):
        load(vit, weights="pakced")
