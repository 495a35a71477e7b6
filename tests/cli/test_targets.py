"""Targets of ``compress MODEL``: what is refused, how files are named, and what a run finds, says and writes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from compressor.cli.configs import Request
from compressor.cli.search import warn_of_growth
from compressor.cli.targets import TargetConfig
from compressor.formats.content import Content, SharedTensor, Table
from compressor.formats.errors import UsageError
from compressor.formats.file.reader import PackedFile
from tests.helpers.file_commands import MODEL, Ran, type_

__all__ = ["type_"]  # the fixture

pytestmark = pytest.mark.usefixtures("own_folder")

WHY = "finds the shared values by the price of bits: leave out"
PRICED = "schemes with a price: learnt"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--target-size", "50KB", "--rate", "1e-7"), "--target-size and --rate: name one"),
        (("--target-bits", "1", "--max-drop", "0"), "--target-bits and --max-drop: name one"),
        (("--target-size", "much"), "Invalid value for '--target-size': 'much' is no size: expected 250000, 250KB"),
        (("--target-size", "0"), "--target-size 0: expected a finite number above 0"),
        (("--target-bits", "0"), "Invalid value for '--target-bits': '0', expected a number above 0"),
        (("--target-bits", "nan"), "--target-bits nan: expected a finite number above 0"),
        (("--rate", "inf"), "Invalid value for '--rate': 'inf', expected a number above 0 and at most 1"),
        (("--max-drop", "-1"), "Invalid value for '--max-drop': '-1', expected a number at least 0"),
        (("--calibration", "noise"), "Invalid value for '--calibration': 'noise', expected data, synthetic or none"),
        (
            ("--calibration-memory", "lots"),
            "Invalid value for '--calibration-memory': 'lots' is no size: expected 250000",
        ),
        (("--calibration-memory", "0"), "--calibration-memory 0: expected at least 1 byte, better 200MB or more"),
        (
            ("--calibration-memory", "200MB", "--calibration", "none"),
            "--calibration-memory and --calibration none, by which nothing is measured: leave out one",
        ),
        (
            ("--from-scratch", "--calibration-memory", "200MB"),
            "--from-scratch starts from random weights: leave out --calibration-memory",
        ),
        (("--pretrained", "--max-drop", "1"), "--max-drop needs data to measure on: name --dataset or --data-dir"),
        (("--pretrained", "--calibration", "data"), "--calibration data: there is none; name --dataset or --data-dir"),
        (("--from-scratch", "--rate", "1e-7"), "--from-scratch starts from random weights: leave out --rate"),
        (
            ("--from-scratch", "--calibration", "none"),
            "--from-scratch starts from random weights: leave out --calibration",
        ),
        (("--max-drop", "1", "--codec", "bits"), "--max-drop takes the smallest codec: leave out --codec bits"),
        (
            ("--target-size", "50KB", "--calibration-images", "8"),
            "--calibration-images 8: expected at least 16 to calibrate on, or --calibration synthetic or none",
        ),
        (("--target-size", "50KB", "--bits", "4"), f"--target-size {WHY} --bits; {PRICED}"),
        (("--rate", "1e-7", "--scheme", "learnt", "--codewords", "9"), f"--rate {WHY} --codewords; {PRICED}"),
        (("--rate", "1e-7", "--set", "rate=1e-8"), f"--rate {WHY} --set rate; {PRICED}"),
        (("--max-drop", "1", "--scheme", "wfn", "--delta", "0.01"), f"--max-drop {WHY} --delta; {PRICED}"),
        (
            ("--target-bits", "1", "--scheme", "kmeans"),
            f"--target-bits and --scheme kmeans, which has no price of bits: name another one; {PRICED}",
        ),
        (("--target-bits", "1", "--scheme", "lernt"), "no scheme 'lernt'. Did you mean 'learnt'?"),
    ],
)
def test_refused_in_one_line(type_: Callable[..., Ran], words: tuple[str, ...], line: str) -> None:
    code, out, err = type_(MODEL, *words)
    assert (code, out, len(err)) == (2, "", 1)
    assert err[0].startswith(f"error: {line}")


def test_contradictions_are_refused_before_torch_is_imported(type_: Callable[..., Ran]) -> None:
    Path("ask.py").write_text(
        "import sys; from compressor.cli.main import run\n"
        f"code = run(['{MODEL}', '--target-size', '50KB', '--rate', '1e-7']); sys.exit('torch' in sys.modules or code)"
    )
    assert subprocess.run([sys.executable, "ask.py"], capture_output=True).returncode == 2


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"target_size": 450_000}, "test_resnet-digits-learnt-450KB"),
        ({"target_size": 1_500_000, "dataset": "fashion-mnist"}, "test_resnet-fashion-mnist-learnt-1.5MB"),
        ({"target_bits": 0.5, "pretrained": True}, "test_resnet-learnt-0.5bits"),
        ({"max_drop": 0.3}, "test_resnet-digits-learnt-drop0.3"),
        ({"rate": 1e-7}, "test_resnet-digits-learnt-rate1e-7"),
        ({"rate": 1e-7, "sparsity": 0.5}, "test_resnet-digits-learnt-sparsity0.5-rate1e-7"),
        ({"target_size": 450_000, "recipe": "mixed3"}, "test_resnet-digits-mixed3-450KB"),
        ({}, "test_resnet-digits-learnt4"),
    ],
)
def test_files_are_named_after_the_target(values: dict[str, Any], name: str) -> None:
    assert str(Request.from_command_line(MODEL, values).output_path()) == f"{name}.safetensors"


@pytest.mark.parametrize(
    ("values", "command"),
    [
        ({"target_size": 450_000}, "--scheme learnt --target-size 450KB"),
        ({"rate": 1e-7, "calibration": "synthetic"}, "--scheme learnt --rate 1e-7 --calibration synthetic"),
        ({"max_drop": 0.0, "recipe": "mixed3"}, "--recipe mixed3 --max-drop 0"),
        ({"bits": 3}, "--scheme learnt --bits 3"),
    ],
)
def test_the_command_for_own_data_has_the_target(values: dict[str, Any], command: str) -> None:
    given = Request.from_command_line(MODEL, values).command_for_own_data()
    assert given == f"compress {MODEL} --pretrained --data-dir IMAGES {command}"


@pytest.mark.parametrize(
    ("values", "calibration"),
    [
        ({}, "data"),
        ({"data_dir": Path("images"), "pretrained": True}, "data"),
        ({"pretrained": True}, "synthetic"),
        ({"pretrained": True, "calibration": "none"}, "none"),
        ({"calibration": "synthetic"}, "synthetic"),
    ],
)
def test_images_are_of_the_data_where_there_is_any(values: dict[str, Any], calibration: str) -> None:
    assert Request.from_command_line(MODEL, values).calibration == calibration


def test_an_impossible_size_is_refused_before_a_baseline_is_trained(
    type_: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.models.baseline.train", None)
    code, _, err = type_(MODEL, "--target-size", "500")
    assert code == 2
    assert err[-1].startswith("error: --target-size 500: with all weights zero the file takes ")
    assert err[-1].endswith(" bytes; ask for more")


@pytest.mark.slow
def test_built_in_digits_in_50_kb(type_: Callable[..., Ran]) -> None:
    code, out, err = type_(MODEL, "--baseline-epochs", "2", "--epochs", "0", "--target-size", "50KB", "--json")
    assert code == 0, err
    document = json.loads(out)
    size = Path("test_resnet-digits-learnt-50KB.safetensors").stat().st_size
    assert 49_000 <= size <= 50_000
    assert document["target"]["size"] == document["totals"]["file"] == size
    assert document["target"]["calibration"] == {"images": 256, "source": "data"}
    assert document["top1"]["packed"] > document["top1"]["dense"] - 0.05


@pytest.mark.slow
def test_pack_makes_its_own_images(type_: Callable[..., Ran]) -> None:
    torch.manual_seed(0)
    save_file(timm.create_model(MODEL, num_classes=10, in_chans=1).state_dict(), "own.safetensors")
    words = [
        MODEL,
        "--checkpoint-path",
        "own.safetensors",
        "--num-classes",
        "10",
        "--in-chans",
        "1",
        "--img-size",
        "32",
    ]
    code, out, err = type_("pack", *words, "--target-size", "60KB", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["target"]["calibration"] == {"images": 256, "source": "batch-norm statistics"}
    size = Path(f"{MODEL}-learnt-60KB.safetensors").stat().st_size
    assert 58_800 <= size <= 60_000
    with PackedFile.open(f"{MODEL}-learnt-60KB.safetensors") as file:
        assert file.preprocessing is not None
        assert file.preprocessing["input_size"] == [1, 32, 32]
    assert type_("pack", *words, "--target-size", "60KB", "--calibration", "none", "-o", "none")[0] == 0
    assert 58_800 <= Path("none").stat().st_size <= 60_000


@pytest.mark.parametrize("target", [TargetConfig(target_bits=8.0), TargetConfig(target_size=100)])
def test_a_file_above_its_target_is_warned_of(target: TargetConfig, caplog: pytest.LogCaptureFixture) -> None:
    """The bits are those of the 100 weights that a rule shares; a norm on a grid is none of them."""
    ruled, norm = SharedTensor((4, 25), 0, np.zeros(100, np.uint8)), SharedTensor((9,), 0, np.zeros(9, np.uint8))
    content = Content({"a.weight": ruled, "b.bias": norm}, (Table.of([0.0]),), provenance={"rules": [0]})
    work: Any = SimpleNamespace(target=target, trains=lambda _: False, recipe=SimpleNamespace(stages=[None]))
    warn_of_growth(work, content, 100)
    assert not caplog.messages
    warn_of_growth(work, content, 101)
    assert caplog.messages == [f"the file has 101 bytes, more than the 100 of {target.flag}"]


def test_no_epochs_need_no_data_to_train_on() -> None:
    Request.from_command_line(MODEL, {"checkpoint_path": Path("w.safetensors"), "epochs": 0}).check()
    with pytest.raises(UsageError, match="no data to train on for --epochs"):
        Request.from_command_line(MODEL, {"checkpoint_path": Path("w.safetensors"), "epochs": 1}).check()
