"""The command on data of the user's own: Fashion-MNIST's files, a folder of pictures, and evaluation on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

import compressor
from compressor.cli.main import run
from compressor.data.datasets import FASHION_MNIST_DIR

pytestmark = pytest.mark.usefixtures("own_folder", "one_worker")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Bright and dark pictures: six of each to train on, two of each to validate on."""
    random = np.random.RandomState(0)
    for split, count in (("train", 6), ("val", 2)):
        for name, base in (("bright", 128), ("dark", 0)):
            (tmp_path / "own" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = base + random.randint(0, 128, (36, 36, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "own" / split / name / f"{number}.png")
    return tmp_path / "own"


@pytest.mark.slow
def test_folder_of_pictures(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data-dir", str(pictures), "--img-size", "32", "--baseline-epochs", "1", "--epochs", "1", "--bits", "3"]
    assert run(["test_resnet", *words, "--batch-size", "4"]) == 0
    captured = capsys.readouterr()
    assert "No data named" not in captured.err
    assert "top-1 on 4 validation images" in captured.out
    assert "IMAGES" not in captured.out
    file = "test_resnet-own-learnt3.safetensors"
    loaded: Any = compressor.load(file)
    assert loaded.pretrained_cfg["input_size"] == (3, 32, 32)
    assert loaded.num_classes == 2
    assert run(["eval", file, "--data-dir", str(pictures), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["top1"]["packed"] == document["top1"]["recorded"]


@pytest.mark.slow
@pytest.mark.skipif(not FASHION_MNIST_DIR.is_dir(), reason="Debian package dataset-fashion-mnist is not installed")
def test_fashion_mnist(capsys: pytest.CaptureFixture[str]) -> None:
    save_file(timm.create_model("test_resnet", num_classes=10, in_chans=1).state_dict(), "own.safetensors")
    words = ["--dataset", "fashion-mnist", "--checkpoint-path", "own.safetensors", "--epochs", "0", "--bits", "4"]
    assert run(["test_resnet", *words]) == 0
    captured = capsys.readouterr()
    assert "1/3 weights" in captured.err
    assert "top-1 on 10,000 test images" in captured.out
    assert Path("test_resnet-fashion-mnist-learnt4.safetensors").is_file()
