"""Pictures that cannot be read are counted and listed, and left out; never replaced, and never too many."""

from __future__ import annotations

import errno
import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from compressor.cli.main import run
from compressor.data import splits
from compressor.data.bad_images import BadImages
from compressor.data.datasets import Dataset, load_data
from compressor.formats.errors import MissingError, ResourceError
from compressor.training.evaluation import evaluate

CONFIG = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear"}


def encoded(mode: str = "RGB", kind: str = "PNG", size: int = 36) -> bytes:
    pixels = np.random.RandomState(0).randint(0, 256, (size, size, 4), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels[..., :3]).convert(mode).save(stream, kind)
    return stream.getvalue()


PNG, JPEG = encoded(), encoded(kind="JPEG")
DAMAGED = {
    "empty": b"",
    "text": b"no picture at all",
    "signature alone": PNG[:8],
    "truncated PNG": PNG[: len(PNG) // 2],
    "truncated JPEG": JPEG[: len(JPEG) // 2],
    "bits flipped": PNG[:60] + bytes(byte ^ 255 for byte in PNG[60:90]) + PNG[90:],
    "a chunk of nonsense": PNG[:33] + b"\0\0\0\4????" + PNG[41:],
}
UNUSUAL = {
    "CMYK": encoded("CMYK", "JPEG"),
    "1-bit": encoded("1"),
    "palette": encoded("P"),
    "grey": encoded("L", "JPEG"),
}


pytestmark = pytest.mark.usefixtures("own_folder", "one_worker")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight pictures to train on, four to validate on."""
    for split, count in (("train", 4), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / "own" / split / name).mkdir(parents=True)
            for number in range(count):
                (tmp_path / "own" / split / name / f"{number}.png").write_bytes(PNG)
    return tmp_path / "own"


class Bright(nn.Module):
    """Says 0 for zeros, else 1."""

    def forward(self, images: Tensor) -> Tensor:
        seen = (images.flatten(1) != 0).any(1).float()
        return torch.stack([1 - seen, seen], 1)


def opened(folder: Path, most: int = 0) -> Dataset:
    return load_data("", folder, config=CONFIG, bad=BadImages(most, Path("bad_images.txt")))


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_images_are_left_out_and_listed(what: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "val" / "dog" / "1.png").write_bytes(DAMAGED[what])
    with caplog.at_level(logging.WARNING):
        result = evaluate(Bright(), opened(folder, most=1).eval_loader(4))
    assert result.correct.tolist() == [False, False, True], "the neighbours are the two cats and a dog"
    (line,) = Path("bad_images.txt").read_text().splitlines()
    assert line.startswith("validation: ")
    assert "1.png " in line
    assert "Error: " in line or line.endswith("1.png no image of a format that is known here")
    assert "1 of the images opened cannot be read, left out; see" in caplog.text
    with pytest.raises(MissingError, match=r"1 of the images opened cannot be read, 0 allowed.*--max-bad-images 1"):
        evaluate(Bright(), opened(folder).eval_loader(4))
    assert "replaced" not in caplog.text, "the list is the same"
    Path("bad_images.txt").write_text("a list of another folder")
    evaluate(Bright(), opened(folder, most=1).eval_loader(4))
    assert "bad_images.txt is replaced; it listed other images, or something else" in caplog.text
    assert Path("bad_images.txt").read_text() == f"{line}\n"


@pytest.mark.parametrize("what", UNUSUAL)
def test_unusual_images_are_read(what: str, folder: Path) -> None:
    (folder / "val" / "dog" / "1.png").write_bytes(UNUSUAL[what])
    assert evaluate(Bright(), opened(folder).eval_loader(4)).n == 4
    assert not Path("bad_images.txt").exists()


def test_an_image_that_would_fill_the_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 36 * 36 // 3)
    with pytest.raises(MissingError, match=r"4 of the images opened cannot be read.*DecompressionBombError"):
        evaluate(Bright(), opened(folder).eval_loader(4))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves its neighbour open
def test_timm_would_have_put_a_neighbour_in_its_place(folder: Path) -> None:
    """Why its data set is not used: this test may go when it no longer does."""
    from timm.data import create_dataset

    (folder / "val" / "dog" / "1.png").unlink()
    (folder / "val" / "dog" / "1.png").symlink_to(folder / "nowhere")
    timms: Any = create_dataset("", str(folder), "validation")
    assert timms[3][0].size == (36, 36)
    ours = opened(folder).validation
    images, label = ours[3]
    assert label == splits.UNREADABLE
    assert not images.any()


def test_training_leaves_them_out(folder: Path) -> None:
    (folder / "train" / "cat" / "2.png").write_bytes(b"")
    data = opened(folder, most=1)
    batches = list(data.train_loader(3, 0))
    assert sum(len(labels) for _, labels in batches) == 7
    assert all(images.any(dim=(1, 2, 3)).all() for images, _ in batches)
    for number in range(4):
        (folder / "train" / "dog" / f"{number}.png").write_bytes(b"")
        (folder / "train" / "cat" / f"{number}.png").write_bytes(b"")
    with pytest.raises(MissingError, match="none of the 3 images of a batch"):
        next(iter(data.train_loader(3, 0)))


def test_too_many_open_files_are_no_fault_of_a_picture(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    data = opened(folder)
    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(ResourceError, match="image 3 of the validation split: Too many open files"):
        data.validation[3]


@pytest.mark.slow
def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "test_resnet",
        "--data-dir",
        str(folder),
        "--img-size",
        "32",
        "--bits",
        "3",
        "-o",
        "out",
        "--batch-size",
        "4",
    ]
    words += ["--baseline-epochs", "1", "--epochs", "1"]
    (folder / "train" / "cat" / "0.png").write_bytes(b"")
    (folder / "val" / "cat" / "0.png").write_bytes(JPEG[:300])
    assert run(words) == 4
    error = capsys.readouterr().err.splitlines()[-1]
    assert "2 of the images opened cannot be read, 0 allowed: train: " in error, "both, before any training"
    assert run([*words, "--max-bad-images", "2", "--force"]) == 0
    assert "top-1 on 3 validation images" in capsys.readouterr().out
    assert len(Path("bad_images.txt").read_text().splitlines()) == 2
    assert run(["eval", "out", "--data-dir", str(folder)]) == 4
    assert "--max-bad-images 1" in capsys.readouterr().err
    assert run(["eval", "out", "--data-dir", str(folder), "--max-bad-images", "1", "--json"]) == 0
