"""Baselines: trained once, kept under everything they depend on, and trained anew when the file is damaged."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
import pytest
import timm
import torch
from torch import nn

from compressor.cache import cache_dir
from compressor.data.datasets import Dataset, load_data
from compressor.data.splits import ArraySplit
from compressor.formats.errors import MissingError
from compressor.models.baseline import BaselineRecipe, create_model, train_baseline
from compressor.training.loop import Epoch
from tests.helpers.tiny import few_digits

ARGS = {"num_classes": 10, "in_chans": 1}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TIMM_COMPRESSOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def data() -> Dataset:
    """The digits, 130 to train on."""
    digits = load_data("digits")
    assert isinstance(digits.train, ArraySplit)
    digits.train.images, digits.train.labels = digits.train.images[:130], digits.train.labels[:130]
    return digits


@timm.models.register_model
def answers_0(pretrained: bool = False, **_: Any) -> nn.Module:
    """A network that is sure of class 0."""
    layer = nn.Linear(1024, 10)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.eye(10)[0])
    return nn.Sequential(nn.Flatten(), layer)


def same(one: object, other: object) -> bool:
    assert isinstance(one, dict)
    assert isinstance(other, dict)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_second_call_reuses_the_first(data: Dataset, cache: Path) -> None:
    told: list[Epoch] = []
    first = train_baseline("test_resnet", ARGS, data, epochs=2, on_epoch=told.append)
    second = train_baseline("test_resnet", ARGS, data, epochs=2, on_epoch=told.append)
    assert (first.reused, second.reused) == (False, True)
    assert [epoch.number for epoch in told] == [1, 2]
    assert same(first.state, second.state)
    assert first.figures == second.figures
    assert 0 <= first.figures["validation_top1"] <= 1
    assert second.path is not None
    assert second.path.parent == cache
    create_model("test_resnet", ARGS).load_state_dict(dict(second.state))


def test_a_seed_repeats_the_training(data: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = train_baseline("test_resnet", ARGS, data, epochs=1)
    monkeypatch.setenv("TIMM_COMPRESSOR_CACHE", str(tmp_path / "other"))
    second = train_baseline("test_resnet", ARGS, data, epochs=1)
    assert not second.reused
    assert same(first.state, second.state)


def test_everything_it_depends_on_is_in_the_key(data: Dataset, cache: Path) -> None:
    train_baseline("test_resnet", ARGS, data, epochs=0)
    train_baseline("test_resnet", ARGS, data, epochs=0, seed=1)
    train_baseline("test_resnet", ARGS, replace(data, version="digits-2"), epochs=0)
    train_baseline("test_resnet", ARGS | {"drop_rate": 0.1}, data, epochs=0)
    assert len(list(cache.glob("*.safetensors"))) == 4


@pytest.mark.parametrize(
    "change",
    [{"mean": (0.5,)}, {"std": (0.5,)}, {"name": "others"}, {"input_size": (1, 40, 40)}, {"channels_last": True}],
)
def test_data_that_is_prepared_otherwise_is_other_data(data: Dataset, cache: Path, change: dict[str, Any]) -> None:
    train_baseline("test_resnet", ARGS, data, epochs=0)
    assert not train_baseline("test_resnet", ARGS, replace(data, **change), epochs=0).reused
    assert train_baseline("test_resnet", ARGS, data, epochs=0).reused
    assert len(list(cache.glob("*.safetensors"))) == 2


def test_top1_is_that_of_the_validation_split(data: Dataset) -> None:
    """All labels of the validation split are 0, all of the test split 1, and the model answers 0."""
    digits = load_data("digits")
    for split, label in ((digits.validation, 0), (digits.test, 1)):
        assert isinstance(split, ArraySplit)
        split.images, split.labels = split.images[:8], torch.full((8,), label)
    trained = train_baseline("answers_0", {}, digits, epochs=0)
    assert trained.figures["validation_top1"] == 1.0


@pytest.mark.parametrize("position", [3, 200, -1])
def test_damaged_entry_is_trained_anew(
    data: Dataset, cache: Path, caplog: pytest.LogCaptureFixture, position: int
) -> None:
    first = train_baseline("test_resnet", ARGS, data, epochs=0)
    assert first.path is not None
    content = bytearray(first.path.read_bytes())
    content[position] ^= 0x40
    first.path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        second = train_baseline("test_resnet", ARGS, data, epochs=0)
    assert not second.reused
    assert "damaged" in caplog.text
    assert same(first.state, second.state)
    assert train_baseline("test_resnet", ARGS, data, epochs=0).reused


def test_folder_that_cannot_be_written(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TIMM_COMPRESSOR_CACHE", str(tmp_path / "file" / "cache"))
    baseline = train_baseline("test_resnet", ARGS, data, epochs=0)
    assert baseline.path is None
    assert "will not be kept" in caplog.text


def test_a_second_process_waits(data: Dataset, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = train_baseline("test_resnet", ARGS, data, epochs=0).path
    assert kept is not None
    held = threading.Event()

    def hold() -> None:
        with filelock.FileLock(kept.with_suffix(".lock")):
            held.set()
            time.sleep(1)

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    assert train_baseline("test_resnet", ARGS, data, epochs=0).reused
    assert "waiting" in caplog.text
    other.join()


def test_where_baselines_are_kept(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert cache_dir() == cache
    monkeypatch.delenv("TIMM_COMPRESSOR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/timm-compressor")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "timm-compressor"


def test_models_without_batch_norm_get_adamw() -> None:
    vit = create_model("test_vit", {**ARGS, "img_size": 32})
    resnet = create_model("test_resnet", ARGS)
    assert (BaselineRecipe.for_model(vit).opt, BaselineRecipe.for_model(vit).epochs) == ("adamw", 40)
    assert (BaselineRecipe.for_model(resnet).opt, BaselineRecipe.for_model(resnet).epochs) == ("sgd", 12)
    assert BaselineRecipe.for_model(vit, 3).epochs == 3


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_trainings_of_a_few_steps(epochs: int) -> None:
    """Of two, four and six; torch's one cycle divides by zero where the quarter it rises in is one step."""
    baseline = train_baseline("tiny", ARGS, few_digits(), epochs=epochs)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in baseline.state.values())
    assert baseline.figures["epochs"] == epochs


def test_arguments_a_model_does_not_take() -> None:
    with pytest.raises(MissingError, match=r"timm cannot build test_resnet with \{'nonsense': 1\}"):
        create_model("test_resnet", {"nonsense": 1})
