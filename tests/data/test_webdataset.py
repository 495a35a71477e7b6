"""WebDataset shards: every picture has its place, and what is damaged is named."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from compressor.cli.main import run
from compressor.data.bad_images import BadImages
from compressor.data.datasets import Dataset, load_data
from compressor.data.webdataset import Shards, open_shards
from compressor.formats.errors import MissingError
from tests.data.test_bad_images import CONFIG, DAMAGED, JPEG, PNG
from tests.faults.test_damaged_files import Says, says

__all__ = ["says"]  # the fixture

DATA = ("--dataset", "wds/own", "--data-dir", "own")


def write_shard(path: Path, files: Mapping[str, bytes], compress: bool = False) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w:gz" if compress else "w") as shard:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))


def samples(count: int, classes: int = 2, first: int = 0) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for number in range(first, first + count):
        files |= {f"{number:04}.cls": b"%d\n" % (number % classes), f"{number:04}.png": PNG, f"{number:04}.json": b"{}"}
    return files


@pytest.fixture(autouse=True)
def own(own_folder: Path) -> Path:
    """Six pictures to train on, in two shards; two to validate on."""
    folder = own_folder / "own"
    write_shard(folder / "own-train-0000.tar", samples(4))
    write_shard(folder / "own-train-0001.tar", samples(2, first=4))
    write_shard(folder / "own-val-0000.tar", samples(2))
    return folder


def opened(most: int = 0) -> Dataset:
    return load_data("wds/own", "own", config=CONFIG, bad=BadImages(most, Path("bad_images.txt")))


def test_pictures_have_their_places(own: Path) -> None:
    splits = open_shards(own)
    assert {split: len(shards) for split, shards in splits.items()} == {"train": 6, "validation": 2}
    train = splits["train"]
    assert [train[index][0].read() == PNG for index in range(6)] == [True] * 6
    assert [train[index][1] for index in range(6)] == [0, 1, 0, 1, 0, 1]
    assert train.filename(5) == "own-train-0001.tar/0005"
    assert all(shards.class_to_idx == {"0": 0, "1": 1} for shards in splits.values())


def test_a_data_set_of_them(own: Path) -> None:
    data = opened()
    assert (data.num_classes, data.input_size, data.test) == (2, (3, 32, 32), None)
    images, labels = next(iter(data.eval_loader(4, "validation")))
    assert images.shape == (2, 3, 32, 32)
    assert torch.equal(images[0], images[1])
    assert labels.tolist() == [0, 1]
    version = data.version
    assert opened().version == version
    write_shard(own / "own-val-0000.tar", samples(2, classes=1))
    assert opened().version != version, "a label has changed"


def test_splits_as_timms_info_says(own: Path) -> None:
    for path in list(own.iterdir()):
        path.rename(own / path.name.replace("train", "a").replace("val", "b"))
    with pytest.raises(MissingError, match=r"no images for train; expected shards such as train-0000\.tar"):
        open_shards(own)
    files = {"train": ["own-a-0001.tar", "own-a-0000.tar"], "validation": ["own-b-0000.tar"]}
    info = {split: {"filenames": names, "num_samples": 1, "shard_lengths": [1]} for split, names in files.items()}
    (own / "_info.json").write_text(json.dumps({"splits": info}))
    assert open_shards(own)["train"].filename(0) == "own-a-0001.tar/0004"
    (own / "_info.json").write_text('{"splits": [1')
    with pytest.raises(MissingError, match=r"_info\.json: cannot be read \(JSONDecodeError: "):
        open_shards(own)


@pytest.mark.parametrize(
    ("name", "split"), [("latest-train-0.tar", "train"), ("Train_7.tar", "train"), ("x.test.tar", "test")]
)
def test_names_are_read_by_the_word(own: Path, name: str, split: str) -> None:
    before = {which: len(shards) for which, shards in open_shards(own).items()}
    write_shard(own / name, samples(3))
    after = {which: len(shards) for which, shards in open_shards(own).items()}
    assert after == {**before, split: before.get(split, 0) + 3}


def test_keys_and_kinds(tmp_path: Path) -> None:
    """A key ends at the first dot of a name, folders are part of it; what has no picture is no sample."""
    files = {
        "a.b/1.seg.png": b"another picture", "a.b/1.JPG": JPEG, "a.b/1.cls": b"3", "2.txt": b"", "2.cls": b"0",
        "__pax__/readme": b"", "3.cls": b"1", "3.webp": PNG,
    }  # fmt: skip
    write_shard(tmp_path / "s.tar", files)
    shards = Shards([tmp_path / "s.tar"])
    assert shards.samples == [("s.tar/a.b/1", 3), ("s.tar/3", 1)]
    assert shards[0][0].read() == JPEG


def test_a_class_without_a_picture_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_shard(tmp_path / "s.tar", {"1.png": PNG, "1.cls": b"0", "2.1.png": PNG, "2.cls": b"0", "3.cls": b"1"})
    assert len(Shards([tmp_path / "s.tar"])) == 1
    assert caplog.messages == ["2 samples have a class and no image (.jpg, .jpeg, .png, .webp, .ppm), as s.tar/2"]


@pytest.mark.parametrize("name", ["7.png", "7.cls"])
@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.GNUTYPE_SPARSE])
def test_what_does_not_lie_there_is_refused(own: Path, name: str, kind: bytes) -> None:
    """A link is no picture, and a sparse file's bytes are not in a row: neither may be left out, or read as it is."""
    with tarfile.open(own / "own-train-0001.tar", "a", format=tarfile.GNU_FORMAT) as shard:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "0004.png"
        shard.addfile(member)
    with pytest.raises(MissingError, match=rf"own-train-0001.tar: {name} is a (link|sparse file), expected its bytes"):
        open_shards(own)


def test_two_of_one_name_are_refused(tmp_path: Path) -> None:
    """Shards made of folders whose names were left out: the second cat would hide the first dog."""
    shard = tmp_path / "s.tar"
    write_shard(shard, {"1.png": PNG, "1.cls": b"0"})
    with tarfile.open(shard, "a") as more:
        more.addfile(tarfile.TarInfo("1.PNG"))
    with pytest.raises(MissingError, match=r"1\.PNG is there twice"):
        Shards([shard])


def test_a_name_that_is_no_text(own: Path) -> None:
    for path in own.glob("*-0000.tar"):
        with tarfile.open(path, "a", format=tarfile.GNU_FORMAT) as shard:
            for kind, content in ((".png", DAMAGED["truncated PNG"]), (".cls", b"1")):
                member = tarfile.TarInfo("caf\udce9" + kind)
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    data = opened(most=1)
    assert [int(label) < 0 for label in next(iter(data.eval_loader(4, "validation")))[1]] == [False, False, True]
    data.validation.bad.all_splits.check()  # type: ignore[attr-defined]
    assert Path("bad_images.txt").read_text().startswith("validation: own-val-0000.tar/caf? OSError: ")


def test_numbers_no_file_can_have(own: Path) -> None:
    """As they come of flipped bits: a size of 2^70, in tar's own way of writing what eight digits cannot."""
    shard = own / "own-train-0000.tar"
    header = bytearray(shard.read_bytes())
    header[124:136] = b"\x80" + (1 << 70).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    shard.write_bytes(header)
    with pytest.raises(MissingError, match=r"own-train-0000.tar: cannot be read \("):
        open_shards(own)


def test_damaged_pictures_are_counted_and_listed(own: Path) -> None:
    pictures = {"7.png": DAMAGED["truncated PNG"], "7.cls": b"1", "8.png": PNG, "8.cls": b"0"}
    write_shard(own / "own-val-0000.tar", pictures)
    data = opened(most=1)
    loader = data.eval_loader(4, "validation")
    assert [int(label) < 0 for label in next(iter(loader))[1]] == [True, False]
    data.validation.bad.all_splits.check()  # type: ignore[attr-defined]
    assert Path("bad_images.txt").read_text().startswith("validation: own-val-0000.tar/7 OSError: ")


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({"1.png": PNG}, "1 has no .cls beside it, expected a number from 0, below 1,000,000, in 1.cls"),
        ({"1.png": PNG, "1.cls": b"cat"}, "1 has the class b'cat', expected a number from 0"),
        ({"1.png": PNG, "1.cls": b"-1"}, "1 has the class b'-1', expected"),
        ({"1.png": PNG, "1.cls": b"9" * 30}, "1 has the class b'999"),
        ({"1.txt": b"", "1.cls": b"1"}, "own: no images for validation"),
    ],
)
def test_shards_that_cannot_be(says: Says, own: Path, files: dict[str, bytes], line: str) -> None:
    write_shard(own / "own-val-0000.tar", files)
    assert line in says(4, "test_resnet", *DATA)


def test_files_that_are_no_shards(says: Says, own: Path) -> None:
    shard = own / "own-val-0000.tar"
    whole = shard.read_bytes()
    write_shard(shard, samples(2), compress=True)
    assert f"shard {shard.relative_to(own.parent)}: cannot be read (" in says(4, "test_resnet", *DATA)
    shard.write_bytes(whole[:1600])
    assert "(unexpected end of data); a plain .tar is expected" in says(4, "test_resnet", *DATA)
    shard.unlink()
    assert "no images for validation; expected shards such as validation-0000.tar" in says(4, "test_resnet", *DATA)
    assert "name the folder of its shards with --data-dir" in says(4, "test_resnet", "--dataset", "wds/own")


def test_a_whole_run(own: Path) -> None:
    words = ("--img-size", "32", "--baseline-epochs", "1", "--epochs", "1", "--batch-size", "4", "--workers", "1")
    assert run(["test_resnet", *DATA, *words, "--scheme", "kmeans", "--bits", "2", "-o", "out"]) == 0
    assert run(["eval", "out", *DATA]) == 0
