"""The shipped checkpoints are what their index says, and the commands take zoo:NAME where they take a file."""

from __future__ import annotations

import hashlib
import shlex
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from compressor import Policy, Recipe, Rule, Stage, model_zoo
from compressor.cli.compress import compress
from compressor.data.datasets import FASHION_MNIST_DIR
from compressor.data.splits import ArraySplit
from compressor.formats.errors import IntegrityError, MissingError
from compressor.formats.file.reader import PackedFile
from compressor.model_zoo import index
from compressor.report.provenance import Accuracy, Measured, read_provenance
from compressor.training.evaluation import Evaluation

NAMES = model_zoo.list_checkpoints()
SMALL = "test_resnet-tiny"
SLICE = Path(__file__).parents[1] / "data" / "fashion-mnist-200.safetensors"
BUDGET = 3_000_000  # bytes that all checkpoints may add to the wheel
TINY = 1.0  # bits per weight

Ran = tuple[int, str, str]


@pytest.fixture
def other_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo of the small checkpoint alone, free to be damaged; give its file."""
    path = tmp_path / "checkpoints" / f"{SMALL}.safetensors"
    path.parent.mkdir()
    path.write_bytes(model_zoo.packed_path(f"zoo:{SMALL}").read_bytes())
    monkeypatch.setattr(index, "INDEX", tmp_path / "index.toml")  # the index itself was read before
    return path


def first_200(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the first 200 test images as the model's own preprocessing asks for them, and their labels."""
    stored = load_file(SLICE)
    cfg: Any = model.pretrained_cfg
    (mean,), (std,) = cfg["mean"], cfg["std"]
    pad = (cfg["input_size"][-1] - stored["images"].shape[-1]) // 2
    return ArraySplit(stored["images"][:, None], stored["labels"].long(), mean=mean, std=std, pad=pad).__getitems__(
        range(200)
    )


@pytest.mark.parametrize("weights", ["dense", "packed"])
@pytest.mark.parametrize("name", NAMES)
def test_accuracy_on_the_stored_slice(name: str, weights: str) -> None:
    model = model_zoo.load(name, weights)
    images, labels = first_200(model)
    with torch.inference_mode():
        correct = int((model(images).argmax(1) == labels).sum())
    assert correct == model_zoo.checkpoint(name).correct_of_first_200


def test_slice_is_of_the_test_images() -> None:
    if not FASHION_MNIST_DIR.is_dir():
        pytest.skip("needs Debian's package dataset-fashion-mnist")
    from compressor.data.datasets import load_data

    images, labels = load_data("fashion-mnist").test.__getitems__(range(200))  # type: ignore[union-attr]
    kept = first_200(model_zoo.load(SMALL))
    assert torch.equal(images, kept[0])
    assert torch.equal(labels, kept[1])


@pytest.mark.parametrize("name", NAMES)
def test_index_is_true_of_the_file(name: str) -> None:
    entry = model_zoo.checkpoint(name)
    path = model_zoo.packed_path(f"zoo:{name}")
    data = path.read_bytes()
    assert (hashlib.sha256(data).hexdigest(), len(data)) == (entry.sha256, entry.bytes)
    with PackedFile.open(path) as file:
        made, recipe, named = read_provenance(file), file.recipe, file.model
        assert not list(file.check())
    assert recipe is not None
    assert named is not None
    assert named["name"] == entry.model
    assert made.top1 == Accuracy(packed=entry.top1, dense=entry.dense_top1)
    assert made.data == Measured(name=entry.dataset, version="fashion-mnist-1", split="test", n=entry.n)
    assert (made.seed, made.parameters) == (entry.seed, entry.parameters)


@pytest.mark.parametrize("name", NAMES)
def test_command_is_the_one_that_made_the_file(name: str) -> None:
    entry = model_zoo.checkpoint(name)
    program, *words = shlex.split(entry.command)
    asked = compress.make_context("run", words).params
    assert program == "compress"
    assert (asked["model"], asked["dataset"]) == (entry.model, entry.dataset)
    assert (asked["seed"], str(asked["output"])) == (entry.seed, f"{name}.safetensors")
    assert bool(asked["checkpoint_path"]) == bool(entry.dense_sha256)
    with PackedFile.open(model_zoo.packed_path(f"zoo:{name}")) as file:
        found = Recipe.from_dict(dict(file.recipe or {})).to_dict()  # what it leaves out is as ever
    if asked["target_size"] is None:
        expected = Recipe.from_toml(model_zoo.recipe_text(asked["recipe"])).to_dict()
    else:
        assert 0.9 * asked["target_size"] <= entry.bytes <= asked["target_size"]
        rate = found["stage"][0]["rule"][0]["rate"]
        expected = Recipe((Stage(Policy([Rule("*", scheme="learnt", rate=rate)])),)).to_dict()
    for stage in expected["stage"]:
        stage.update({key: asked[key] for key in ("epochs", "lr", "batch_size") if asked[key] is not None})
    assert found == expected


@pytest.mark.parametrize("name", NAMES)
def test_interval_is_wilsons(name: str) -> None:
    entry = model_zoo.checkpoint(name)
    correct = torch.arange(entry.n) < round(entry.top1 * entry.n)
    assert entry.n == 10_000
    assert entry.interval == pytest.approx(Evaluation(correct, torch.zeros(len(correct))).interval, abs=1e-5)


def test_bits_of_a_weight_are_those_of_the_whole_file() -> None:
    assert replace(model_zoo.checkpoint(SMALL), bytes=1_500, parameters=6_000).bits_per_weight == 2.0


def test_families_and_sizes() -> None:
    entries = {name: model_zoo.checkpoint(name) for name in NAMES}
    balanced = {entry.model for name, entry in entries.items() if name.endswith("-balanced")}
    tiny = {name: entry for name, entry in entries.items() if name.endswith("-tiny")}
    assert {"test_resnet", "resnet18", "mobilenetv3_small_050", "test_vit"} <= balanced
    assert {"test_resnet", "resnet18"} <= {entry.model for entry in tiny.values()}
    assert all(entry.bits_per_weight < TINY for entry in tiny.values())
    assert sum(entry.bytes for entry in entries.values()) <= BUDGET


def test_folder_holds_what_the_index_names() -> None:
    folder = index.INDEX.parent / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.safetensors" for name in NAMES]


def test_wheel_holds_all_of_it() -> None:
    root = Path(__file__).parents[2]
    setup = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    shipped = {
        path for glob in setup["package-data"]["compressor.model_zoo"] for path in (root / "model_zoo").glob(glob)
    }
    kept = {path for path in (root / "model_zoo").rglob("*") if path.suffix in (".toml", ".safetensors")}
    assert shipped == kept


def test_unknown_checkpoint() -> None:
    with pytest.raises(MissingError, match=r"no checkpoint 'resnet18-tin'\. Did you mean 'resnet18-tiny'\? Shipped"):
        model_zoo.load("resnet18-tin")


def test_file_that_was_lost(other_index: Path) -> None:
    other_index.unlink()
    with pytest.raises(MissingError, match=rf"zoo:{SMALL}: .* cannot be read \(No such file .*\): install the package"):
        model_zoo.load(SMALL)


def test_file_that_is_another(other_index: Path) -> None:
    data = bytearray(other_index.read_bytes())
    data[-1] ^= 1
    other_index.write_bytes(data)
    with pytest.raises(IntegrityError, match=rf"zoo:{SMALL}: the sha256 of .* is [0-9a-f]{{64}}, expected "):
        model_zoo.load(SMALL)
