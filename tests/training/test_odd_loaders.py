"""Loaders, optimisers and embeddings that cannot be trained with: one line before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from compressor import Compressor, Policy, Rule
from compressor.formats.errors import UsageError

LEARNT = Policy([Rule("*", scheme="learnt", bits=2)])
INPUTS, TARGETS = torch.zeros(8, 16), torch.arange(8)


class Items(Dataset[Any]):
    def __init__(self, item: Any) -> None:
        self.item = item

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return self.item


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(INPUTS, TARGETS, strict=True))


class SizedStream(Stream):
    def __len__(self) -> int:
        return 8


def prepared() -> Compressor:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    return Compressor(model, LEARNT).prepare()


def good() -> DataLoader[Any]:
    return DataLoader(TensorDataset(INPUTS, TARGETS), 4)


PAIR = "a batch must be a pair of tensors (inputs, targets), got "
HELP = ": give the loader a collate_fn that returns the pair"
BATCHES: dict[str, tuple[Any, str]] = {
    "dict": ({"image": INPUTS[0], "label": 3}, "dict of image Tensor, label Tensor"),
    "three": ((INPUTS[0], 3, 0), "list of Tensor, Tensor, Tensor"),
    "inputs alone": (INPUTS[0], "a Tensor"),
    "names of classes": ((INPUTS[0], "cat"), "list of Tensor, tuple"),
}


@pytest.mark.parametrize("use", ["train", "val"])
@pytest.mark.parametrize("kind", BATCHES)
def test_batches_that_are_no_pair(kind: str, use: str) -> None:
    item, got = BATCHES[kind]
    loader = DataLoader(Items(item), 4)
    with pytest.raises(UsageError) as caught:
        prepared().finetune(loader if use == "train" else good(), loader if use == "val" else None, 1)
    assert str(caught.value) == f"{PAIR}{got}{HELP}"


def test_batches_to_estimate_batch_norm_on() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16))
    with pytest.raises(
        UsageError, match=r"^a batch must be a pair of tensors .* got dict of image Tensor, label Tensor"
    ):
        Compressor(model, LEARNT).prepare().finish(calibration=DataLoader(Items(BATCHES["dict"][0]), 4))
    for loader in (good(), DataLoader(Items(INPUTS[0]), 4)):
        Compressor(model, LEARNT).prepare().finish(calibration=loader)


NO_LOADER = "training takes a torch.utils.data.DataLoader of batches (inputs, targets), got "
ONE_OF_A_LIST = "; DataLoader(batches, batch_size=None) makes one of a list of batches"
LOADERS: dict[str, tuple[Callable[[], Any], str]] = {
    "list": (lambda: [(INPUTS, TARGETS)], f"{NO_LOADER}list{ONE_OF_A_LIST}"),
    "none": (lambda: None, f"{NO_LOADER}NoneType{ONE_OF_A_LIST}"),
    "stream": (
        lambda: DataLoader(Stream(), 4),
        "the loader has no length, which learning rates and rounds are planned by: give its data set a __len__, the "
        "number of its items",
    ),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_loaders_without_what_training_needs(kind: str) -> None:
    make, line = LOADERS[kind]
    with pytest.raises(UsageError) as caught:
        prepared().finetune(make(), epochs=1)
    assert str(caught.value) == line


def test_what_the_lines_advise_helps() -> None:
    assert prepared().finetune(DataLoader(SizedStream(), 4), epochs=1).steps == 2
    batches: Any = [(INPUTS, TARGETS)] * 3
    assert prepared().finetune(DataLoader(batches, batch_size=None), good(), epochs=1).steps == 3


def test_a_data_set_to_evaluate_on_is_no_loader() -> None:
    with pytest.raises(UsageError, match=r"single items: make batches, DataLoader\(data, batch_size\)"):
        prepared().finetune(good(), TensorDataset(INPUTS, TARGETS), 1)  # type: ignore[arg-type]


def test_optimisers_of_second_order() -> None:
    job = prepared()
    with pytest.raises(UsageError, match=r"^opt 'adahessian' with .*: it needs second derivatives, which"):
        job.finetune(good(), epochs=1, opt="adahessian")
    assert job.steps == 0


@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize(("option", "value", "off"), [("sparse", True, False), ("max_norm", 1.0, None)])
def test_embeddings_that_cannot_be_trained(layer: Any, option: str, value: Any, off: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), layer(50, 16, **{option: value}))
    job = Compressor(model, LEARNT).prepare()
    with pytest.raises(UsageError) as caught:
        job.attach(torch.optim.SGD(job.param_groups(0.1)), 10)
    assert str(caught.value) == (
        f"1.weight: an embedding with {option} cannot be trained while it shares values: "
        f"model.get_submodule('1').{option} = {off}, or Rule.ignore('1')"
    )
    setattr(job.model.get_submodule("1"), option, off)
    job.attach(torch.optim.SGD(job.param_groups(0.1)), 10)
    ignored = Compressor(model, Policy([Rule.ignore("1"), *LEARNT.given])).prepare()
    ignored.attach(torch.optim.SGD(ignored.param_groups(0.1)), 10)
    assert len(Compressor(model, LEARNT).prepare().finish().content.sites) == 2, "without training it is packed"
