"""A practitioner: own images of mixed formats, own weights, few classes, a budget, and a colleague with timm alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_transform
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

import compressor
from tests.helpers.file_commands import Ran, type_

__all__ = ["type_"]  # the fixture

pytestmark = pytest.mark.usefixtures("own_folder", "one_worker")
MODEL, CLASSES, BUDGET = "test_resnet", ("crow", "dove", "gull", "rook", "wren"), 60_000
PREPARED = {
    "input_size": (3, 32, 32), "mean": (0.4, 0.4, 0.4), "std": (0.25, 0.25, 0.25), "crop_pct": 1.0,
    "crop_mode": "center", "interpolation": "bilinear",
}  # fmt: skip
ASKED = ("--img-size", "32", "--mean", "0.4", "--std", "0.25", "--crop-pct", "1", "--interpolation", "bilinear")
FORMS = (("png", "RGB"), ("jpg", "RGB"), ("png", "L"), ("jpeg", "CMYK"), ("png", "P"), ("png", "RGBA"))


def save_bird(path: Path, number: int, seed: int) -> None:
    """Writes a bright stripe on noise; where it is tells the class, more or less."""
    random = np.random.RandomState(seed)
    height, width = 36 + seed % 9, 40 + seed % 5
    pixels = random.randint(0, 90, (height, width, 3))
    row = round((number + 0.5) * height / len(CLASSES) + random.normal(0, 2.5))
    pixels[max(row - 2, 0) : max(row + 2, 1)] += 120
    ending, mode = FORMS[seed % len(FORMS)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(path.with_suffix(f".{ending}"))


def write_birds(folder: Path) -> None:
    """Writes 2,000 images, and two files that are none that timm reads."""
    for number, name in enumerate(CLASSES):
        for index in range(400):
            split = "val" if index < 80 else "train"
            save_bird(folder / split / name / str(index), number, index + 400 * number)
    Image.new("RGB", (40, 40)).save(folder / "train" / "crow" / "odd.webp")
    (folder / "train" / "crow" / "notes.txt").write_text("seen at noon")


def batches(split: str, batch_size: int, **transform: Any) -> DataLoader[Any]:
    """Open the images by timm alone, as its validation script prepares them."""
    prepared = create_transform(**{**PREPARED, **transform}, is_training=False)
    return DataLoader(create_dataset("", "own", split, transform=prepared), batch_size, shuffle=split == "train")


@torch.no_grad()
def answers(model: nn.Module, **transform: Any) -> Tensor:
    """Classify the validation images: right or wrong, one by one."""
    found = [model.eval()(images).argmax(1) == labels for images, labels in batches("validation", 256, **transform)]
    return torch.cat(found)


def train_own(path: Path) -> nn.Module:
    """Leave what timm's train.py leaves of a distributed training: raw weights, here useless, and their average."""
    torch.manual_seed(0)
    raw, model = (timm.create_model(MODEL, num_classes=len(CLASSES)) for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(2):
        for images, labels in batches("train", 25):
            optimizer.zero_grad()
            functional.cross_entropy(model.train()(images), labels).backward()
            optimizer.step()
    states = {"state_dict": raw, "state_dict_ema": model}
    saved = {key: {f"module.{name}": one for name, one in net.state_dict().items()} for key, net in states.items()}
    torch.save({"epoch": 7, "arch": MODEL, **saved, "optimizer": optimizer.state_dict()}, path)
    return model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # timm leaves the files of images open
def test_from_own_images_and_weights_to_a_colleague(type_: Callable[..., Ran]) -> None:
    write_birds(Path("own"))
    code, out, err = type_("check-data", "own")
    assert code == 0
    assert "own: 1,600 train, 400 validation images of 5 classes; left out of train: 1 .webp, 1 .txt" in err[0]
    assert [line.split() for line in out.splitlines()[1:]] == [[name, "320", "80"] for name in CLASSES]

    dense = train_own(Path("mine.pth.tar"))
    right = answers(dense)
    assert right.float().mean() > 0.5, "or there would be nothing to lose"
    own = ("--data-dir", "own", "--checkpoint-path", "mine.pth.tar", *ASKED)
    budget = ("--target-size", "60KB", "--epochs", "1", "--batch-size", "25", "-o", "small.safetensors")
    code, out, err = type_(MODEL, *own, *budget, "--json")
    assert code == 0, err
    made = json.loads(out)
    assert made["top1"]["dense"] == float(right.double().mean())
    assert made["totals"]["file"] == Path("small.safetensors").stat().st_size <= BUDGET
    assert [row["epoch"] for row in made["history"]] == [1]
    trained, interval = made["top1"]["packed"], (made["top1"]["low"], made["top1"]["high"])

    assert_inspect_says_it(type_, made)

    code, out, _ = type_("eval", "small.safetensors", "--data-dir", "own", "--json")
    found = json.loads(out)
    assert (code, found["model"]) == (0, made["model"])
    assert found["top1"]["packed"] == found["top1"]["recorded"] == trained
    assert (found["top1"]["low"], found["top1"]["high"]) == interval

    loaded: Any = compressor.load("small.safetensors")
    packed = answers(loaded)
    assert float(packed.double().mean()) == trained
    assert tuple(loaded.pretrained_cfg["label_names"]) == CLASSES

    assert type_("unpack", "small.safetensors", "-o", "colleague")[0] == 0
    assert_timm_answers_alike(packed)


def assert_inspect_says_it(type_: Callable[..., Ran], made: dict[str, Any]) -> None:
    """Fails unless inspect tells of the file what the command said that made it."""
    code, out, _ = type_("inspect", "small.safetensors")
    heading = {line[:10].strip(): line[10:] for line in out.split("\n\n")[0].splitlines() if line[0] != " "}
    assert (code, heading["model"]) == (0, "test_resnet(num_classes=5)")
    assert heading["images"] == "3x32x32, bilinear, crop 1 center, mean 0.4, std 0.25"
    assert heading["classes"] == f"5: {', '.join(CLASSES)}"
    assert f"packed file {100 * made['top1']['packed']:.1f} %" in heading["accuracy"]
    told = json.loads(type_("inspect", "small.safetensors", "--json")[1])
    same = ("model", "preprocessing", "recipe", "sites", "left", "totals", "weight_space", "gap_coded", "provenance")
    assert {key: told[key] for key in same} == {key: made[key] for key in same}


def assert_timm_answers_alike(packed: torch.Tensor) -> None:
    """Fails unless timm alone gives, of the unpacked folder, the answers of the packed file."""
    theirs: Any = timm.create_model("local-dir:colleague", pretrained=True)
    config = timm.data.resolve_data_config(model=theirs)  # type: ignore[no-untyped-call]
    assert torch.equal(answers(theirs, **config), packed)
    assert not torch.equal(answers(theirs, mean=(0.0,) * 3, crop_pct=0.5), packed), "or the test would prove nothing"
    assert tuple(theirs.pretrained_cfg["label_names"]) == CLASSES
