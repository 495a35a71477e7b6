"""Data sets: fixed splits, exact preprocessing, seeded augmentation, and files that are absent or damaged."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from compressor.cli.main import run
from compressor.data.datasets import FASHION_MNIST_DIR, load_data
from compressor.data.splits import ArraySplit, ImageSplit
from compressor.formats.errors import MissingError, UsageError

needs_fashion = pytest.mark.skipif(
    not FASHION_MNIST_DIR.is_dir(), reason="Debian package dataset-fashion-mnist is not installed"
)


def batches(loader: Any) -> tuple[Tensor, Tensor]:
    pairs = list(loader)
    return torch.cat([images for images, _ in pairs]), torch.cat([labels for _, labels in pairs])


def test_digits_are_normalised_and_split_60_20_20() -> None:
    data = load_data("digits")
    images, labels = batches(data.eval_loader(256, "train"))
    assert images.shape == (1078, 1, 32, 32)
    assert labels.dtype == torch.int64
    still, _ = batches(data.eval_loader(256, "validation"))
    assert abs(float(still.mean())) < 0.02
    assert abs(float(still.std()) - 1) < 0.02
    from sklearn.datasets import load_digits

    order = np.random.RandomState(0).permutation(1797)
    parts = [batches(data.eval_loader(360, split))[1] for split in ("train", "validation", "test")]
    assert torch.equal(torch.cat(parts), torch.from_numpy(load_digits().target[order]).long())


def test_evaluation_is_the_same_twice_and_training_is_not() -> None:
    data = load_data("digits")
    assert data.evaluated == "test"
    assert torch.equal(batches(data.eval_loader(64))[0], batches(data.eval_loader(360))[0])
    loader = data.train_loader(64, seed=0)
    assert not torch.equal(batches(loader)[1], batches(loader)[1])


def test_a_seed_repeats_the_batches() -> None:
    data = load_data("digits")
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(batches(data.train_loader(64, seed=5)))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize(("count", "expected"), [(9, [4, 4]), (10, [4, 4, 2]), (1, [1])])
def test_no_last_batch_of_one(count: int, expected: list[int]) -> None:
    data = load_data("digits")
    few = ArraySplit(torch.zeros(count, 1, 4, 4), torch.zeros(count).long(), mean=0, std=1)
    object.__setattr__(data, "train", few)
    assert [len(labels) for _, labels in data.train_loader(4, seed=0)] == expected


def test_augmentation_shifts_and_mirrors_whole_images() -> None:
    picture = torch.zeros(1, 1, 9, 9)
    picture[0, 0, 4, 4:6] = torch.tensor([1.0, 0.5])
    split = ArraySplit(picture.repeat(400, 1, 1, 1), torch.zeros(400).long(), mean=0, std=1, shift=2, flip=True)
    images, _ = split.__getitems__(range(400))
    assert images.shape == (400, 1, 9, 9)
    assert torch.allclose(images.sum((1, 2, 3)), torch.tensor(1.5))
    centres = (images == 1).nonzero()[:, 2:]
    assert centres.min(0).values.tolist() == [2, 2]
    assert centres.max(0).values.tolist() == [6, 6]
    left_to_right = sum(1 for image in images if 0.5 in image[0][:, (image[0] == 1).nonzero()[0, 1] + 1])
    assert 150 < left_to_right < 250


def test_shift_equals_a_slow_twin() -> None:
    from compressor.data.splits import _shifted

    padded = torch.randn(20, 3, 12, 10)
    torch.manual_seed(1)
    fast = _shifted(padded, 2)
    torch.manual_seed(1)
    top, left = torch.randint(0, 5, (2, 20)).tolist()
    slow = [image[:, y : y + 8, x : x + 6] for image, y, x in zip(padded, top, left, strict=True)]
    assert torch.equal(fast, torch.stack(slow))


@needs_fashion
def test_fashion_mnist_splits_and_pixels() -> None:
    data = load_data("fashion-mnist")
    sizes = [len(split) for split in (data.train, data.validation, data.test)]  # type: ignore[arg-type]
    assert sizes == [55_000, 5_000, 10_000]
    with gzip.open(FASHION_MNIST_DIR / "train-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)[55_000]
    expected = np.pad((pixels.astype(np.float32) / 255 - np.float32(0.286)) / np.float32(0.353), 2)
    image, label = data.validation[0]
    assert np.allclose(image[0].numpy(), expected, atol=1e-6)
    assert image[0, 0, 0] == 0
    assert 0 <= int(label) < 10


def test_fashion_mnist_files_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"apt-get install dataset-fashion-mnist.*--data-dir"):
        load_data("fashion-mnist", tmp_path)


def test_fashion_mnist_files_damaged(tmp_path: Path) -> None:
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(b"not gzip")
    with pytest.raises(MissingError, match="cannot be unpacked"):
        load_data("fashion-mnist", tmp_path)
    file.write_bytes(gzip.compress(b"\0" * 100))
    with pytest.raises(MissingError, match="not the expected 60000x28x28 bytes"):
        load_data("fashion-mnist", tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of pictures: two classes, four to train on and two to validate on."""
    pixels = np.random.RandomState(0)
    for split, count in (("train", 4), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(pixels.randint(0, 256, (40, 48, 3), dtype=np.uint8))
                image.save(tmp_path / split / name / f"{number}.png")
    return tmp_path


CONFIG = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear"}


def test_folder_of_pictures(folder: Path) -> None:
    data = load_data("", folder, config=CONFIG)
    assert (data.num_classes, data.evaluated, data.input_size) == (2, "validation", (3, 32, 32))
    assert data.train_loader(4, 0).num_workers > 0
    object.__setattr__(data, "workers", 0)
    images, labels = batches(data.train_loader(4, 0))
    assert images.shape == (8, 3, 32, 32)
    assert sorted(labels.tolist()) == [0] * 4 + [1] * 4
    assert len(batches(data.eval_loader(3))[1]) == 4
    with pytest.raises(UsageError, match="no test split"):
        data.eval_loader(3, "test")


def test_a_test_folder_is_used_where_there_is_one(folder: Path) -> None:
    (folder / "test").mkdir()
    (folder / "val" / "cat").rename(folder / "test" / "cat")
    with pytest.raises(MissingError, match="train and validation have different classes: cat"):
        load_data("", folder, config=CONFIG)
    (folder / "val" / "dog").rename(folder / "test" / "dog")
    (folder / "val").rmdir()
    with pytest.raises(MissingError, match="no folder for validation"):
        load_data("", folder, config=CONFIG)
    (folder / "val").symlink_to(folder / "train")
    assert load_data("", folder, config=CONFIG).evaluated == "test"


def test_identity_follows_the_files(folder: Path) -> None:
    before = load_data("", folder, config=CONFIG).version
    assert load_data("", folder, config=CONFIG).version == before
    (folder / "train" / "cat" / "0.png").unlink()
    assert load_data("", folder, config=CONFIG).version != before


def test_folder_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no such folder"):
        load_data("", tmp_path / "nothing")
    with pytest.raises(MissingError, match="Found 0 images"):
        load_data("", tmp_path)
    with pytest.raises(MissingError, match="torch/cifar10, split train"):
        load_data("torch/cifar10", tmp_path)


def test_augmentation_is_timms(folder: Path) -> None:
    plain = load_data("", folder, config=CONFIG)
    more = load_data("", folder, config=CONFIG, augment={"auto_augment": "rand-m9-mstd0.5", "re_prob": 0.25})
    assert plain.version != more.version, "a baseline that is kept was trained otherwise"
    assert isinstance(plain.train, ImageSplit)
    assert isinstance(more.train, ImageSplit)
    for word in ("RandAugment", "RandomErasing"):
        assert word in str(more.train.transform)
        assert word not in str(plain.train.transform)
        assert word not in str(more.validation.transform)  # type: ignore[attr-defined]
    assert torch.equal(more.train[(0, 7)][0], more.train[(0, 7)][0]), "by the seed alone"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--data-dir", ".", "--aa", "rnd-m9"), "{'auto_augment': 'rnd-m9'}: timm makes no augmentation of it"),
        (
            ("--aa", "rand-m9", "--reprob", "0.5"),
            "auto_augment, re_prob: for files of images; digits is augmented in its own",
        ),
        (("--pretrained", "--aa", "rand-m9"), "no data to train on for --aa: name --dataset or --data-dir"),
    ],
)
def test_augmentation_that_cannot_be(
    folder: Path, words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert run(["test_resnet", *words]) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


@pytest.mark.parametrize("name", ["tfds/mnist", "hfids/beans"])
def test_streams_are_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["test_resnet", "--dataset", name, "--pretrained"]) == 2
    assert capsys.readouterr().err.startswith(f"error: --dataset {name}: a stream does not know")


def test_hugging_face_without_its_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds", raising=False)
    assert run(["test_resnet", "--dataset", "hfds/beans", "--baseline-epochs", "1"]) == 4
    captured = capsys.readouterr()
    needs = "error: data set hfds/beans needs a package that is not installed: pip install datasets\n"
    assert (captured.out, captured.err) == ("", needs)


@pytest.mark.parametrize(("name", "near"), [("digit", "digits"), ("fashion-minst", "fashion-mnist")])
def test_a_misspelt_data_set(name: str, near: str) -> None:
    with pytest.raises(MissingError, match=f"no data set '{name}'. Did you mean '{near}'?"):
        load_data(name)
