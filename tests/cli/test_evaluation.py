"""compress eval, as a user types it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from compressor import Compressor, Policy, Rule
from compressor.formats.file.reader import PackedFile
from tests.helpers.file_commands import Ran, type_
from tests.helpers.pictures import CLASSES, write_folder

__all__ = ["type_"]  # the fixture

pytestmark = pytest.mark.usefixtures("own_folder", "one_worker")


@pytest.fixture
def packed() -> Path:
    """A file that says it was measured on torch/mnist, and dense weights beside it."""
    torch.manual_seed(0)
    model: Any = timm.create_model("test_resnet", num_classes=3)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 32), "label_names": CLASSES}
    save_file(model.state_dict(), "dense.safetensors")
    job = Compressor(model, Policy([Rule("*", scheme="kmeans", bits=1)]), teacher=None).prepare().finish()
    job.note(data={"name": "torch/mnist", "version": "1", "split": "validation", "n": 9}, top1={"packed": 0.5})
    job.save("packed.safetensors")
    write_folder(Path("own"), {"train": 1, "val": 4})
    return Path("packed.safetensors")


def test_data_that_is_not_built_in_has_to_be_named(type_: Callable[..., Ran], packed: Path) -> None:
    code, out, err = type_("eval", str(packed))
    line = f"error: {packed} was measured on 'torch/mnist', which is not built in: name --dataset, or the folder of "
    assert (code, out, err) == (2, "", [f"{line}your images with --data-dir"])


def test_figures_against_dense_weights_class_by_class(type_: Callable[..., Ran], packed: Path) -> None:
    words = ["eval", str(packed), "--data-dir", "own", "--against", "dense.safetensors", "--per-class"]
    code, out, err = type_(*words)
    lines = out.splitlines()
    assert code == 0
    assert err == [
        "data               own: 3 train, 12 validation images of 3 classes",
        "images             3x32x32, bilinear, crop 0.95 center, mean 0.5, std 0.5",
    ]
    assert lines[0].startswith("top-1 on 12 validation images  dense ")
    assert lines[1].startswith("loss dense ")
    assert lines[1].endswith(" images/s"), "of three classes, all are among the best five"
    assert lines[2].split() == ["class", "images", "dense", "top-1", "lost", "gained"]
    assert [line.split()[:2] for line in lines[3:]] == [[name, "4"] for name in CLASSES]
    code, out, _ = type_(*words, "--json")
    document = json.loads(out)
    assert document["loss"]["dense"] != document["loss"]["packed"]
    assert sum(row["packed"] for row in document["classes"]) == round(12 * document["top1"]["packed"])
    assert sum(row["dense"] for row in document["classes"]) == round(12 * document["top1"]["dense"])
    assert [row["packed"] - row["dense"] for row in document["classes"]] == [
        row["gained"] - row["lost"] for row in document["classes"]
    ]
    with PackedFile.open(packed) as file:
        assert document["content_sha256"] == file.content_sha256()
    _, out, _ = type_(*words[:4], "--against", str(packed), "--json")
    document = json.loads(out)
    assert document["loss"]["dense"] == document["loss"]["packed"]


def test_images_are_prepared_as_asked_for(type_: Callable[..., Ran], packed: Path) -> None:
    words = ("eval", str(packed), "--data-dir", "own", "--mean", "0.25", "--std", "0.125", "--json")
    code, out, err = type_(*words)
    assert code == 0
    assert err[-1] == "images             3x32x32, bilinear, crop 0.95 center, mean 0.25, std 0.125"
    asked = json.loads(out)
    assert asked["preprocessing"]["mean"] == [0.25] * 3
    assert asked["loss"] != json.loads(type_(*words[:4], "--json")[1])["loss"]


def test_weights_of_another_model(type_: Callable[..., Ran], packed: Path) -> None:
    save_file(timm.create_model("test_resnet", num_classes=5).state_dict(), "five.safetensors")
    code, _, err = type_("eval", str(packed), "--data-dir", "own", "--against", "five.safetensors")
    assert (code, err) == (4, ["error: --against five.safetensors: 5 classes in the checkpoint: expected 3"])


def test_top5_is_shown_where_there_are_more_classes(type_: Callable[..., Ran]) -> None:
    names = tuple(f"c{number}" for number in range(6))
    write_folder(Path("own"), {"train": 1, "val": 1}, names)
    model = timm.create_model("test_resnet", num_classes=6)
    Compressor(model, Policy([Rule("*", scheme="kmeans", bits=1)]), teacher=None).prepare().finish().save(
        "p.safetensors"
    )
    code, out, _ = type_("eval", "p.safetensors", "--data-dir", "own", "--img-size", "32")
    assert (code, out.splitlines()[1].startswith("top-5 ")) == (0, True)


def test_against_a_checkpoint_that_ships_and_against_a_folder(type_: Callable[..., Ran], packed: Path) -> None:
    words = ["eval", str(packed), "--data-dir", "own", "--against"]
    code, _, err = type_(*words, "zoo:resnet18-tiny")
    assert code == 4
    assert "holds a 'resnet18', expected a 'test_resnet'" in err[0], "its weights were found, and are of another model"
    Path("timms").mkdir()
    code, _, err = type_(*words, "timms")
    assert (code, err) == (4, ["error: --against timms/model.safetensors: no such file"])
    Path("dense.safetensors").rename("timms/model.safetensors")
    code, out, _ = type_(*words, "timms")
    assert (code, " dense " in out) == (0, True)
    Path("other.safetensors").write_bytes(packed.read_bytes())
    code, out, _ = type_(*words, "other.safetensors")
    assert (code, " other " in out, "dense" in out) == (0, True, False), "it is no dense file"
