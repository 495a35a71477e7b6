"""All images are looked at before the long work: what is bad is counted once, and named; what takes no part is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor.data import scan
from compressor.data.bad_images import BadImages
from compressor.data.datasets import Dataset, load_data
from compressor.data.folder_notes import folder_notes
from compressor.data.scan import count_images, scan_images
from compressor.formats.errors import MissingError
from tests.helpers.pictures import save_picture, write_folder

pytestmark = pytest.mark.usefixtures("own_folder", "one_worker")
CONFIG = {"input_size": (3, 32, 32)}


@pytest.fixture
def folder() -> Path:
    return write_folder(Path("own"), {"train": 3, "val": 2})


def opened(folder: Path, most: int = 0) -> Dataset:
    return load_data("", folder, config=CONFIG, bad=BadImages(most, Path("bad_images.txt")))


def test_every_image_is_opened_once(folder: Path) -> None:
    data, seen = opened(folder), list[int]()
    scan_images(data, lambda: seen.append(1))
    assert len(seen) == count_images(data) == 15
    assert not Path("bad_images.txt").exists()
    assert count_images(load_data("digits")) == 0
    scan_images(load_data("digits"), lambda: pytest.fail("there is no image to open"))


def test_all_bad_images_are_counted_at_once(folder: Path) -> None:
    """Of every split; in instalments, each would cost a run."""
    (folder / "train" / "ant" / "0.png").write_bytes(b"")
    (folder / "val" / "cow" / "1.png").write_bytes(b"no picture")
    whole = (folder / "train" / "bee" / "2.png").read_bytes()
    (folder / "train" / "bee" / "2.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MissingError, match=r"^3 of the images opened cannot be read, 0 allowed: ") as error:
        scan_images(opened(folder))
    for name in ("train: ant/0.png ", "train: bee/2.png ", "validation: cow/1.png ", "--max-bad-images 3"):
        assert name in str(error.value)
    assert len(Path("bad_images.txt").read_text().splitlines()) == 3
    scan_images(opened(folder, most=3))


def test_an_error_names_ten(folder: Path) -> None:
    for number in range(12):
        (folder / "train" / "ant" / f"bad{number}.jpg").write_bytes(b"")
    with pytest.raises(MissingError, match=r"^12 of .* and 2 more; all are in bad_images.txt; ") as error:
        scan_images(opened(folder))
    assert str(error.value).count("no image of a format that is known here") == 10


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_of_very_many_images_the_headers_are_read(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_picture(folder / "train" / "ant" / f"cut.{kind}", size=(100, 100))
    whole = (folder / "train" / "ant" / f"cut.{kind}").read_bytes()
    (folder / "train" / "ant" / f"cut.{kind}").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MissingError, match="1 of the images"):
        scan_images(opened(folder))
    monkeypatch.setattr(scan, "MOST_WHOLE", 15)  # there are 16
    scan_images(opened(folder))
    with pytest.raises(MissingError, match="1 of the images"):
        scan_images(opened(folder), whole=True)
    (folder / "val" / "ant" / "0.png").write_bytes(b"")
    with pytest.raises(MissingError, match="1 of the images"):
        scan_images(opened(folder))


def test_what_takes_no_part_is_said(folder: Path) -> None:
    assert opened(folder).summary == "9 train, 6 validation images of 3 classes"
    for name in ("a.gif", "b.gif", "c.webp", ".hidden"):
        (folder / "train" / "cow" / name).write_bytes(b"")
    (folder / "val" / "cow" / "NOTES").write_text("")
    (folder / "train" / "dog").mkdir()
    data = opened(folder)
    assert data.notes == (
        "left out of train: 2 .gif, 1 .webp (only .jpeg, .jpg, .png are read)",
        "no image in train of dog",
        "left out of validation: 1 without an ending (only .jpeg, .jpg, .png are read)",
    )
    assert data.summary == "; ".join(["9 train, 6 validation images of 3 classes", *data.notes])
    assert data.classes == ("ant", "bee", "cow")


def test_why_splits_differ_is_said(folder: Path) -> None:
    for number in range(2):
        (folder / "val" / "cow" / f"{number}.png").rename(folder / "val" / "cow" / f"{number}.webp")
    reason = r"own: train and validation have different classes: cow \(left out of validation: 2 .webp .* of cow\)"
    with pytest.raises(MissingError, match=reason):
        opened(folder)


def test_images_outside_the_folder_of_a_class(folder: Path) -> None:
    for split in ("train", "val"):
        save_picture(folder / split / "stray.png")
    data = opened(folder)
    assert data.num_classes == 4
    assert data.notes[0] == "1 image of train outside the folders of classes: taken for a class without a name"
    (folder / "val" / "stray.png").unlink()
    with pytest.raises(MissingError, match="different classes: images outside the folder of a class"):
        opened(folder)


def test_other_data_than_folders_has_no_notes() -> None:
    assert folder_notes({"train": object(), "validation": [1, 2]}) == ()


def test_preparation_is_part_of_the_version(folder: Path) -> None:
    """Else a baseline that was trained on other crops would be taken from the cache."""
    before = load_data("", folder, config=CONFIG).version
    assert load_data("", folder, config={**CONFIG, "crop_pct": 0.5}).version != before
    assert load_data("", folder, config={**CONFIG, "mean": (0.5,) * 3}).version != before
    assert load_data("", folder, config={**CONFIG, "crop_pct": 0.875}).version == before, "which is timm's own"
