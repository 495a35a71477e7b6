"""``--teacher``: what the student learns from, and what is refused before the long work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import compressor
from compressor.cli.main import run
from compressor.data.datasets import load_data
from compressor.formats.file.reader import PackedFile
from compressor.models.teacher import Renormalised, load_teacher
from tests.models.test_teacher import ARGS, HALF, QUICK, STUDENT, TEACHER, model_of

pytestmark = pytest.mark.usefixtures("own_folder", "one_worker")


def only_three() -> None:
    """Write a teacher that takes every image for a three."""
    state = model_of(TEACHER).state_dict()
    state["fc.weight"].zero_()
    state["fc.bias"].copy_(torch.where(torch.arange(10) == 3, 20.0, 0.0))
    save_file(state, "three.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    "start", [("--dataset", "digits", "--checkpoint-path", "student.safetensors"), ("--from-scratch",)]
)
def test_the_student_learns_from_the_teacher_named(start: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    only_three()
    save_file(model_of(STUDENT, 1).state_dict(), "student.safetensors")
    words = ("--teacher", TEACHER, "--teacher-checkpoint", "three.safetensors", "--distill", "1", "--lr", "0.003")
    assert run([STUDENT, *start, *words, "--epochs", "1", "--bits", "4", "-o", "out.safetensors"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line[1:2] == "/"]
    steps = [line for line in said if not re.search(r" epoch \d| before it: ", line)]
    assert re.match(r"1/\d teacher +test_resnet  three\.safetensors  validation \d+\.\d %", steps[0])
    assert steps[-1].startswith(f"{len(steps)}/{len(steps)} file")
    student = compressor.load("out.safetensors")
    images = torch.cat([images for images, _ in load_data("digits").eval_loader(90)])
    with torch.no_grad():
        assert (student(images).argmax(1) == 3).float().mean() > 0.9


@pytest.mark.slow
def test_a_teacher_without_weights_is_trained_and_kept_as_a_dense_model_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([TEACHER, "--teacher", TEACHER, *QUICK]) == 0
    teacher, dense, *_ = (line for line in capsys.readouterr().err.splitlines() if re.search(r" epochs?  ", line))
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
    monkeypatch.setattr("compressor.models.teacher.Renormalised", spied)
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
            "--teacher-checkpoint seven.safetensors: 7 classes in the checkpoint: a teacher needs the 10 of its",
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

    monkeypatch.setattr("compressor.models.baseline.train", forbidden)
    Path("r.toml").write_text('[[stage]]\ndistill = 0.0\n[[stage.rule]]\nmatch = "*"\nscheme = "kmeans"\nbits = 4\n')
    save_file(model_of(TEACHER, num_classes=7).state_dict(), "seven.safetensors")
    share = () if "--recipe" in words else ("--scheme", "kmeans", "--bits", "4")
    assert run([STUDENT, *words, *share, *dry]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: " + line)
    assert captured.err.count("\n") == 1
