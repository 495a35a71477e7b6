"""Preprocessing is part of the model: asked for as in timm's scripts, stored, used by eval, and taken along to timm."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import create_dataset, create_transform
from torch import Tensor, nn

import compressor
from compressor.formats.file.reader import PackedFile
from tests.helpers.file_commands import Ran, type_
from tests.helpers.pictures import CLASSES, write_folder

__all__ = ["type_"]  # the fixture

pytestmark = pytest.mark.usefixtures("own_folder", "one_worker")
MODEL = "test_resnet"
ASKED = (
    "--img-size", "32", "--mean", "0.3", "0.25", "0.2", "--std", "0.2", "--crop-pct", "0.9", "--crop-mode", "squash",
    "--interpolation", "nearest",
)  # fmt: skip
RESOLVED = {
    "input_size": (3, 32, 32), "mean": (0.3, 0.25, 0.2), "std": (0.2,) * 3, "crop_pct": 0.9, "crop_mode": "squash",
    "interpolation": "nearest",
}  # fmt: skip
LINE = "images             3x32x32, nearest, crop 0.9 squash, mean 0.3 0.25 0.2, std 0.2"


def resolved(model: Any) -> dict[str, Any]:
    """Return what timm makes of a model's configuration, lists as tuples."""
    config = timm.data.resolve_data_config(model=model)  # type: ignore[no-untyped-call]
    return {key: tuple(one) if isinstance(one, list) else one for key, one in config.items()}


def answers(model: nn.Module, folder: str) -> Tensor:
    """Classify the validation images by timm alone, as the model's configuration says: right or wrong, one by one."""
    transform = create_transform(**resolved(model), is_training=False)
    images = create_dataset("", folder, "validation", transform=transform)
    with torch.no_grad():
        predicted = [int(model.eval()(image[None]).argmax()) for image, _ in images]
    return torch.tensor(predicted) == torch.tensor([label for _, label in images])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # timm leaves the files of images open
def test_accuracy_is_equal_in_all_four_places(type_: Callable[..., Ran]) -> None:
    """At the end of the training, in eval, in what load gives, and in what a colleague with timm alone gets."""
    write_folder(Path("own"), {"train": 16, "val": 12})
    words = ["--data-dir", "own", *ASKED, "--baseline-epochs", "3", "--epochs", "1", "--batch-size", "8", "--bits", "2"]
    code, out, err = type_(MODEL, *words, "-o", "out.safetensors", "--json")
    assert code == 0
    assert err.count(LINE) == 1
    trained = json.loads(out)["top1"]["packed"]
    code, out, err = type_("eval", "out.safetensors", "--data-dir", "own", "--json")
    assert (code, LINE in err) == (0, True)
    evaluated = json.loads(out)["top1"]
    assert evaluated["packed"] == evaluated["recorded"] == trained
    loaded: Any = compressor.load("out.safetensors")
    assert resolved(loaded) == RESOLVED
    assert (loaded.pretrained_cfg["num_classes"], loaded.pretrained_cfg["label_names"]) == (3, CLASSES)
    right = answers(loaded, "own")
    assert float(right.double().mean()) == trained
    assert type_("unpack", "out.safetensors", "-o", "dense")[0] == 0
    theirs: Any = timm.create_model("local-dir:dense", pretrained=True)
    assert torch.equal(answers(theirs, "own"), right)
    assert tuple(theirs.pretrained_cfg["label_names"]) == CLASSES
    code, out, _ = type_("eval", "out.safetensors", "--data-dir", "own", "--img-size", "96", "--mean", "0", "--json")
    otherwise = json.loads(out)
    assert otherwise["preprocessing"]["input_size"] == [3, 96, 96]
    assert otherwise["preprocessing"]["crop_pct"] == 0.9, "what was not asked for is as in the file"
    assert otherwise["top1"]["packed"] != trained, "or the test would prove nothing"
    assert otherwise["top1"]["recorded"] is None


@pytest.fixture
def weights() -> Path:
    torch.manual_seed(0)
    save_file(timm.create_model(MODEL, num_classes=3).state_dict(), "dense.safetensors")
    return Path("dense.safetensors")


def test_a_checkpoint_is_packed_with_its_preprocessing(type_: Callable[..., Ran], weights: Path) -> None:
    Path("names.txt").write_text("ant\nbee\ncow\n")
    words = ["--checkpoint-path", str(weights), "--num-classes", "3", "--scheme", "kmeans", "--bits", "2"]
    code, _, err = type_("pack", MODEL, *words, *ASKED, "--class-map", "names.txt", "-o", "a.safetensors")
    assert (code, err[0]) == (0, LINE)
    cfg: Any = compressor.load("a.safetensors").pretrained_cfg
    assert {key: cfg[key] for key in RESOLVED} == RESOLVED
    assert (cfg["num_classes"], cfg["label_names"]) == (3, CLASSES)
    # A packed file that is packed again says itself how its images are prepared.
    words[1] = "a.safetensors"
    assert type_("pack", MODEL, *words, "-o", "b.safetensors")[0] == 0
    with PackedFile.open("a.safetensors") as one, PackedFile.open("b.safetensors") as two:
        assert one.preprocessing == two.preprocessing
    assert type_("pack", MODEL, *words, "--crop-pct", "1", "-o", "c.safetensors")[0] == 0
    cfg = compressor.load("c.safetensors").pretrained_cfg
    assert {key: cfg[key] for key in RESOLVED} == {**RESOLVED, "crop_pct": 1.0}


def test_without_options_a_file_says_what_timm_says(type_: Callable[..., Ran], weights: Path) -> None:
    words = ["--checkpoint-path", str(weights), "--num-classes", "3", "--scheme", "kmeans", "--bits", "2"]
    code, _, err = type_("pack", MODEL, *words, "-o", "a.safetensors")
    assert (code, err[0].startswith("1/3 weights")) == (0, True)
    loaded = compressor.load("a.safetensors")
    assert resolved(loaded) == resolved(timm.create_model(MODEL))
    assert "label_names" not in loaded.pretrained_cfg  # type: ignore[operator]


@pytest.mark.parametrize(
    ("model", "words", "args", "size"),
    [
        ("test_resnet", ("--img-size", "32"), {}, (3, 32, 32)),
        ("test_vit", ("--img-size", "32"), {"img_size": 32}, (3, 32, 32)),
        ("test_vit", ("--img-size", "160"), {}, (3, 160, 160)),
        ("test_vit", ("--input-size", "3", "32", "48"), {"img_size": [32, 48]}, (3, 32, 48)),
        ("test_resnet", ("--input-size", "1", "32", "48"), {"in_chans": 1}, (1, 32, 48)),
        ("test_resnet", ("--in-chans", "1"), {"in_chans": 1}, (1, 160, 160)),
    ],
)
def test_sizes_reach_the_model_and_the_unpacked_folder(
    model: str, words: tuple[str, ...], args: dict[str, Any], size: tuple[int, ...], type_: Callable[..., Ran]
) -> None:
    torch.manual_seed(0)
    save_file(timm.create_model(model, num_classes=3, **args).state_dict(), "dense.safetensors")
    common = ["--checkpoint-path", "dense.safetensors", "--num-classes", "3", "--scheme", "kmeans", "--bits", "3"]
    assert type_("pack", model, *common, *words, "-o", "a.safetensors")[0] == 0
    with PackedFile.open("a.safetensors") as file:
        assert file.model == {"name": model, "args": {"num_classes": 3, **args}}
    code, out, _ = type_("unpack", "a.safetensors", "-o", "dense")
    line = "load it with: timm.create_model('local-dir:dense', pretrained=True)"
    assert (code, out.splitlines()[-1]) == (0, line)
    ours: Any = compressor.load("a.safetensors")
    theirs: Any = eval(line.partition(": ")[2])
    x = torch.randn(2, *size)
    assert torch.equal(theirs.eval()(x), ours(x))
    config = resolved(theirs)
    assert config == resolved(ours)
    assert config["input_size"] == size
    assert len(config["mean"]) == size[0]


def test_the_line_for_one_file_has_the_preprocessing_too(type_: Callable[..., Ran], weights: Path) -> None:
    words = ["--checkpoint-path", str(weights), "--num-classes", "3", "--scheme", "kmeans", "--bits", "2"]
    assert type_("pack", MODEL, *words, *ASKED, "-o", "a.safetensors")[0] == 0
    _, out, _ = type_("unpack", "a.safetensors", "-o", "one.safetensors")
    model: Any = eval(out.splitlines()[-1].removeprefix("load it with: "))
    assert resolved(model) == RESOLVED


def test_folders_that_unpack_refuses(type_: Callable[..., Ran], weights: Path) -> None:
    words = ["--checkpoint-path", str(weights), "--num-classes", "3", "--scheme", "kmeans", "--bits", "2"]
    assert type_("pack", MODEL, *words, "-o", "a.safetensors")[0] == 0
    Path("dense").mkdir()
    Path("dense/config.json").write_text("mine")
    code, _, err = type_("unpack", "a.safetensors", "-o", "dense")
    assert (code, err[0].partition(":")[2]) == (2, " dense/config.json exists: give another name, or --force "
                                                   "to replace it")  # fmt: skip
    assert [path.name for path in Path("dense").iterdir()] == ["config.json"]
    assert type_("unpack", "a.safetensors", "-o", "dense", "--force")[0] == 0
    assert timm.create_model("local-dir:dense", pretrained=True).num_classes == 3
    assert type_("unpack", "a.safetensors", "-o", "no/dense")[0] == 6


def test_a_class_map_orders_the_classes(type_: Callable[..., Ran], weights: Path) -> None:
    """As timm's --class-map; a class of the map may have no image, and images of other classes are left out."""
    write_folder(Path("own"), {"train": 2, "val": 2})
    Path("names.txt").write_text("cow\nyak\nant\n")
    words = ["--checkpoint-path", str(weights), "--data-dir", "own", "--img-size", "32", "--epochs", "0", "--bits", "2"]
    code, _, err = type_(MODEL, *words, "--scheme", "kmeans", "--class-map", "names.txt", "-o", "a.safetensors")
    assert code == 0
    for split in ("train", "validation"):
        assert f"left out of {split}: 2 images of classes that are not in the class map: bee" in err[0]
        assert f"no image in {split} of yak" in err[0]
    assert err[0].startswith("data               own: 4 train, 4 validation images of 3 classes; ")
    cfg: Any = compressor.load("a.safetensors").pretrained_cfg
    assert cfg["label_names"] == ("cow", "yak", "ant")
    words = ["--data-dir", "own", "--class-map", "names.txt", "--per-class", "--json"]
    code, out, _ = type_("eval", "a.safetensors", *words)
    assert code == 0
    assert [(row["name"], row["images"]) for row in json.loads(out)["classes"]] == [("cow", 2), ("ant", 2)]


def test_sensitivity_takes_the_same_options(type_: Callable[..., Ran], weights: Path) -> None:
    words = ["--checkpoint-path", str(weights), "--num-classes", "3", "--mean", "0.5", "0.5"]
    code, _, err = type_("sensitivity", MODEL, *words)
    assert (code, err) == (2, ["error: --mean: 2 values for images of 3 channels, expected 1 or 3"])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--img-size", "32", "--input-size", "3", "32", "32"), "--input-size and --img-size: name one"),
        (
            ("--in-chans", "1", "--input-size", "3", "32", "32"),
            "--in-chans 1 and --input-size with 3 channels: name one",
        ),
        (("--std", "0.5", "0", "1"), "--std 0: expected numbers above 0"),
        (("--std", "0.5", "0.5"), "--std: 2 values for images of 3 channels, expected 1 or 3"),
        (("--mean", "grey"), "Invalid value for '--mean': 'grey': expected a number, or one for each channel"),
        (("--class-map", "names.pkl"), "--class-map names.pkl: expected a .txt with the name of a class a line"),
        (("--class-map", "none.txt"), "--class-map none.txt: cannot be read (No such file or directory)"),
        (("-o", "x.pt"), "-o x.pt: a packed file ends in .safetensors, name it x.safetensors"),
    ],
)
def test_options_that_cannot_be(words: tuple[str, ...], line: str, type_: Callable[..., Ran], weights: Path) -> None:
    code, out, err = type_("pack", MODEL, "--checkpoint-path", str(weights), "--num-classes", "3", *words)
    assert (code in (2, 4), out) == (True, "")
    assert err[-1].rstrip(".") == f"error: {line}"


def test_data_of_its_own_size_takes_no_options(type_: Callable[..., Ran], weights: Path) -> None:
    for words, line in (
        (("--mean", "0.5"), "--mean: the images of digits are prepared in their own way; leave it out"),
        (("--img-size", "64"), "--img-size 64: the images of digits have 32; leave it out"),
        (("--class-map", "a.txt"), "--class-map a.txt: for folders and hfds/..., digits numbers its own classes"),
    ):
        code, _, err = type_(MODEL, "--dataset", "digits", "--checkpoint-path", str(weights), *words)
        assert (code, err) == (2, [f"error: {line}"])
