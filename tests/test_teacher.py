"""A bigger teacher of its own: read, checked, shown what it was trained on, and learnt from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import compressor
from compressor import Compressor, Policy, Rule
from compressor.cli.main import run
from compressor.datasets import load_data
from compressor.formats.errors import FileError, MissingError, UsageError
from compressor.formats.reader import PackedFile
from compressor.teacher import Renormalised, load_teacher, seeing

ARGS = {"num_classes": 10, "in_chans": 1}
TEACHER, STUDENT = "test_resnet", "test_efficientnet"
HALF = (0.5,), (0.5,)
QUICK = ("--baseline-epochs", "1", "--epochs", "1", "--scheme", "kmeans", "--bits", "4")


pytestmark = pytest.mark.usefixtures("own_folder", "one_worker")


def model_of(name: str, seed: int = 0, **args: Any) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(name, **{**ARGS, **args})
    return model.eval()


def packed(model: nn.Module, path: str = "packed.safetensors", **cfg: Any) -> nn.Module:
    """Write a packed file; give the model that is in it."""
    model.pretrained_cfg = {**model.pretrained_cfg, **cfg}  # type: ignore[assignment, dict-item]
    job = Compressor(model, Policy([Rule("*", scheme="kmeans", bits=6)]), model_args=ARGS, teacher=None)
    job.prepare().finish().save(path)
    return job.model.eval()


numbers = st.floats(-2, 2, width=32)
positive = st.floats(0.125, 4, width=32)


@given(st.tuples(numbers, positive), st.tuples(numbers, positive), st.lists(numbers, min_size=1, max_size=8))
def test_renormalised_sees_the_images_of_its_own_normalisation(
    ours: tuple[float, float], theirs: tuple[float, float], pixels: list[float]
) -> None:
    raw = torch.tensor(pixels, dtype=torch.float64).view(1, 1, 1, -1)
    pairs = [([mean], [std]) for mean, std in (ours, theirs)]
    model = Renormalised(nn.Identity(), pairs[0], pairs[1]).double()
    seen = model((raw - ours[0]) / ours[1])
    torch.testing.assert_close(seen, (raw - theirs[0]) / theirs[1], rtol=1e-5, atol=1e-4)


def test_plain_checkpoint() -> None:
    model, images = model_of(TEACHER), torch.randn(2, 1, 32, 32)
    save_file(model.state_dict(), "plain.safetensors")
    loaded = load_teacher(Path("plain.safetensors"), TEACHER, ARGS, *HALF)
    assert torch.equal(loaded(images), model(images))


def test_packed_file_of_the_same_architecture_under_a_tag() -> None:
    model, images = packed(model_of(f"{TEACHER}.r160_in1k")), torch.randn(2, 1, 32, 32)
    loaded = load_teacher(Path("packed.safetensors"), TEACHER, ARGS, *HALF)  # timm's normalisation is for 3 channels
    assert torch.equal(loaded(images), model(images))


def test_packed_file_knows_its_normalisation() -> None:
    model, raw = packed(model_of(TEACHER), mean=(0.25,), std=(2.0,)), torch.rand(2, 1, 32, 32)
    loaded = load_teacher(Path("packed.safetensors"), TEACHER, ARGS, (0.25,), (2.0,))
    assert torch.equal(loaded(raw), model(raw))
    other = load_teacher(Path("packed.safetensors"), TEACHER, ARGS, *HALF)
    torch.testing.assert_close(other((raw - 0.5) / 0.5), model((raw - 0.25) / 2.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "own", [{"mean": "half"}, {"std": ["a"]}, {"std": (0.0,)}, {"mean": (float("nan"),)}, {"std": None}]
)
def test_normalisation_that_cannot_be(own: dict[str, Any]) -> None:
    with pytest.raises(MissingError, match=r"it is for images normalised by .* expected numbers, std above 0"):
        seeing(nn.Identity(), *HALF, own)


def refused(path: str, name: str = TEACHER) -> str:
    with pytest.raises(MissingError) as caught:
        load_teacher(Path(path), name, ARGS, *HALF)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_checkpoint_of_other_classes_or_another_architecture() -> None:
    save_file(model_of(TEACHER, num_classes=7).state_dict(), "seven.safetensors")
    assert refused("seven.safetensors").startswith("seven.safetensors: its head tells 7 classes apart, expected 10")
    save_file(model_of(TEACHER, in_chans=3).state_dict(), "colour.safetensors")
    said = refused("colour.safetensors")
    assert re.search(r"holds no test_resnet: \S+ \(\d+, 3, 3, 3\), expected \(\d+, 1, 3, 3\)$", said)
    save_file(model_of(STUDENT).state_dict(), "other.safetensors")
    said = refused("other.safetensors")
    assert said.startswith("other.safetensors holds no test_resnet: ")
    assert re.search(r" and \d+ more$", said)
    packed(model_of(STUDENT), "other-packed.safetensors")
    said = refused("other-packed.safetensors")
    assert said == "other-packed.safetensors holds a 'test_efficientnet', expected a 'test_resnet'"


def test_weights_that_are_not_finite() -> None:
    state = model_of(TEACHER).state_dict()
    state["fc.weight"][3, 3] = float("nan")
    save_file(state, "nan.safetensors")
    assert refused("nan.safetensors") == "nan.safetensors: fc.weight has weights that are NaN or infinite"


def test_files_that_are_no_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    def unpickled(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was read")

    torch.save(model_of(TEACHER).state_dict(), "pickle.pth")
    torch.save(model_of(TEACHER).state_dict(), "named.safetensors")
    Path("cut.safetensors").write_bytes(b"\x08")
    monkeypatch.setattr("torch.load", unpickled)
    for name in ("pickle.pth", "named.safetensors", "cut.safetensors"):
        assert refused(name).startswith(f"{name}: damaged, or no safetensors file (")
    assert refused("none.safetensors") == "none.safetensors: no such file"
    assert refused(".") == ".: no such file"


def test_damaged_packed_file() -> None:
    packed(model_of(TEACHER))
    data = bytearray(Path("packed.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    Path("flipped.safetensors").write_bytes(data)
    with pytest.raises(FileError, match=r"flipped\.safetensors"):
        load_teacher(Path("flipped.safetensors"), TEACHER, ARGS, *HALF)


def test_teacher_of_other_classes_in_python() -> None:
    class One(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs[:, :1]

    model = nn.Sequential(nn.Linear(16, 10))
    job = Compressor(model, Policy([Rule("*", scheme="kmeans", bits=2)]), teacher=One()).prepare()
    inputs = torch.randn(4, 16)
    with pytest.raises(UsageError, match=r"the teacher's output is \(4, 1\), expected \(4, 10\)"):
        job.loss(job.model(inputs), torch.zeros(4, dtype=torch.long), inputs)


def only_three() -> None:
    """Write a teacher that takes every image for a three."""
    state = model_of(TEACHER).state_dict()
    state["fc.weight"].zero_()
    state["fc.bias"].copy_(torch.where(torch.arange(10) == 3, 20.0, 0.0))
    save_file(state, "three.safetensors")


@pytest.mark.parametrize(
    "start", [("--dataset", "digits", "--checkpoint-path", "student.safetensors"), ("--from-scratch",)]
)
def test_the_student_learns_from_the_teacher_named(start: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    only_three()
    save_file(model_of(STUDENT, 1).state_dict(), "student.safetensors")
    words = ("--teacher", TEACHER, "--teacher-checkpoint", "three.safetensors", "--distill", "1", "--lr", "0.003")
    assert run([STUDENT, *start, *words, "--epochs", "1", "--bits", "4", "-o", "out.safetensors"]) == 0
    steps = [line for line in capsys.readouterr().err.splitlines() if line[1:2] == "/" and " epoch " not in line]
    assert re.match(r"1/\d teacher +test_resnet  three\.safetensors  validation \d+\.\d %", steps[0])
    assert steps[-1].startswith(f"{len(steps)}/{len(steps)} file")
    student = compressor.load("out.safetensors")
    images = torch.cat([images for images, _ in load_data("digits").eval_loader(90)])
    with torch.no_grad():
        assert (student(images).argmax(1) == 3).float().mean() > 0.9


def test_a_teacher_without_weights_is_trained_and_kept_as_a_dense_model_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([TEACHER, "--teacher", TEACHER, *QUICK]) == 0
    teacher, dense, *_ = (line for line in capsys.readouterr().err.splitlines() if " epochs  " in line)
    assert teacher.startswith("1/5 teacher ")
    assert "kept in" in teacher
    assert dense.startswith("2/5 dense baseline ")
    assert "reused from" in dense
    (kept,) = Path("cache").glob("*.safetensors")
    assert load_teacher(kept, TEACHER, ARGS, *HALF)  # and serves as a checkpoint
    with PackedFile.open("test_resnet-digits-kmeans4.safetensors") as file:
        assert (file.provenance or {})["teacher"] == TEACHER


def test_pretrained_teacher_is_shown_images_as_it_knows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are used as they are, under timm's normalisation for it and not under the student's."""
    seen: list[tuple[float, ...]] = []

    def hub(name: str, args: dict[str, Any], *, pretrained: bool = False, seed: int = 0) -> nn.Module:
        assert pretrained
        return model_of(name, seed, **{"in_chans": 3, **args})

    def spied(model: nn.Module, ours: Any, theirs: Any) -> nn.Module:
        seen.extend((*ours, *theirs))
        return Renormalised(model, ours, theirs)

    random = np.random.RandomState(0)
    for place in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / "own" / place).mkdir(parents=True)
        for number in range(2):
            pixels = random.randint(0, 256, (32, 32, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "own" / place / f"{number}.png")
    monkeypatch.setattr("compressor.cli.weights.create_model", hub)
    monkeypatch.setattr("compressor.teacher.Renormalised", spied)
    words = ["--pretrained", "--baseline-epochs", "0", "--data-dir", "own", "--img-size", "32", "--epochs", "1"]
    assert run([TEACHER, "--teacher", "resnet18", *words, "--batch-size", "2", "--bits", "4"]) == 0
    ours: Any = timm.models.get_pretrained_cfg(TEACHER)
    theirs: Any = timm.models.get_pretrained_cfg("resnet18")
    assert seen == [ours.mean, ours.std, theirs.mean, theirs.std]


@pytest.mark.parametrize(
    ("code", "words", "line"),
    [
        (2, ("--teacher", TEACHER, "--distill", "0"), "--teacher test_resnet and --distill 0: leave out one"),
        (2, ("--teacher", TEACHER, "--epochs", "0"), "--teacher test_resnet: nothing is distilled, epochs or distill"),
        (2, ("--teacher", TEACHER, "--recipe", "r.toml"), "--teacher test_resnet: nothing is distilled, epochs or"),
        (2, ("--teacher-checkpoint", "seven.safetensors"), "--teacher-checkpoint seven.safetensors: name its model"),
        (2, ("--teacher", TEACHER, "--pretrained"), "no data to train on for --teacher: name --dataset or --data-dir"),
        (2, ("--from-scratch", "--distill", "0.5"), "--from-scratch has no dense model to distil from: leave out"),
        (
            2,
            ("--from-scratch", "--baseline-epochs", "2", "--teacher", TEACHER, "--teacher-checkpoint", "x"),
            "--from-scratch trains no dense baseline: leave out --baseline-epochs",
        ),
        (4, ("--teacher", "resnet18x"), f"timm {timm.__version__} has no model 'resnet18x'. Did you mean 'resnet18'?"),
        (
            4,
            ("--teacher", TEACHER, "--teacher-checkpoint", "seven.safetensors"),
            "--teacher-checkpoint seven.safetensors: its head tells 7 classes apart, expected 10; a teacher needs",
        ),
        (
            4,
            ("--teacher", TEACHER, "--teacher-checkpoint", "none.safetensors"),
            "--teacher-checkpoint none.safetensors: no such file",
        ),
        (
            4,
            ("--teacher", "resnet18", "--teacher-checkpoint", "seven.safetensors"),
            "--teacher-checkpoint seven.safetensors holds no resnet18: ",
        ),
    ],
)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_refused_before_the_long_work(
    code: int,
    words: tuple[str, ...],
    line: str,
    dry: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the long work began")

    monkeypatch.setattr("compressor.baseline.train", forbidden)
    Path("r.toml").write_text('[[stage]]\ndistill = 0.0\n[[stage.rule]]\nmatch = "*"\nscheme = "kmeans"\nbits = 4\n')
    save_file(model_of(TEACHER, num_classes=7).state_dict(), "seven.safetensors")
    share = () if "--recipe" in words else ("--scheme", "kmeans", "--bits", "4")
    assert run([STUDENT, *words, *share, *dry]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: " + line)
    assert captured.err.count("\n") == 1
