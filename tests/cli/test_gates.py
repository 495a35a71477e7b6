"""Gates of ``compress MODEL``: what a file must reach, and where it is kept where it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import compressor
from compressor.cli.configs import GateConfig
from compressor.cli.gates import missed_gates
from compressor.cli.main import run
from compressor.cli.result import warn_of_loss
from compressor.formats.errors import CompressorError


@pytest.fixture(autouse=True)
def _here(own_folder: Path) -> None:
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet").state_dict(), "weights.safetensors")


POST_TRAINING = ("test_resnet", "--checkpoint-path", "weights.safetensors", "-o", "out.safetensors")


@pytest.mark.parametrize(
    ("options", "size", "packed", "dense", "said"),
    [
        ({"require_top1": 90.0}, 1, 0.9, None, []),
        ({"require_top1": 90.0}, 1, 0.8999, None, ["top-1 is 89.99 %, --require-top1 90"]),
        ({"require_drop": 0.5}, 1, 0.92, 0.925, []),
        ({"require_drop": 0.5}, 1, 0.92, 0.926, ["top-1 fell by 0.60 points, --require-drop 0.5"]),
        ({"require_drop": -1.0}, 1, 0.92, 0.925, ["top-1 fell by 0.50 points, --require-drop -1"]),
        ({"require_size": 1000}, 1000, None, None, []),
        ({"require_size": 1000}, 1001, None, None, ["the file has 1,001 bytes, --require-size 1,000"]),
        ({}, 10**9, 0.0, 1.0, []),
    ],
)
def test_what_is_missed(options: dict[str, float], size: int, packed: float, dense: float, said: list[str]) -> None:
    assert missed_gates(GateConfig(**options), size, packed, dense) == said  # type: ignore[arg-type]


def test_a_file_that_misses_a_gate_is_kept_as_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    Path("out.safetensors").write_bytes(b"the last good one")
    assert run([*POST_TRAINING, "--force", "--require-size", "10kB", "--json"]) == 5
    captured = capsys.readouterr()
    size = Path("out.safetensors.rejected").stat().st_size
    assert captured.err.splitlines()[-1] == (
        f"error: the file has {size:,} bytes, --require-size 10,000: kept as out.safetensors.rejected, "
        "out.safetensors was not written"
    )
    assert Path("out.safetensors").read_bytes() == b"the last good one"
    told = json.loads(captured.out)
    assert told["file"] == "out.safetensors.rejected"
    assert told["missed"] == [f"the file has {size:,} bytes, --require-size 10,000"]
    assert not compressor.load("out.safetensors.rejected").training


@pytest.mark.slow
def test_accuracy_is_a_gate(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["test_resnet", "--baseline-epochs", "1", "--epochs", "1", "-o", "out.safetensors"]
    assert run([*words, "--require-top1", "100", "--require-drop", "-100"]) == 5
    last = capsys.readouterr().err.splitlines()[-1]
    assert "--require-top1 100; top-1 fell by" in last
    assert last.endswith("kept as out.safetensors.rejected, out.safetensors was not written")
    assert not Path("out.safetensors").exists()
    assert not Path("out.safetensors.checkpoints").exists()


@pytest.mark.parametrize(
    ("size", "code", "said"),
    [
        (
            "1kB",
            2,
            "--require-size 1,000: what is not shared takes 16,680 bytes alone; ask for more, or ",
        ),
        ("100kB", 1, "--require-size 100,000: the file is predicted to take 193,"),
        ("300kB", 1, ""),
    ],
)
def test_a_size_is_judged_before_the_long_work(
    size: str,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def dense_model(*_: object) -> None:
        raise CompressorError("the long work begins")

    monkeypatch.setattr("compressor.cli.run.dense_model", dense_model)
    assert run(["test_resnet", "--require-size", size]) == code
    told = " ".join(caplog.messages) if code == 1 else capsys.readouterr().err
    assert said in told
    assert bool(caplog.messages) == (size == "100kB")


def test_a_gate_that_is_met_changes_nothing() -> None:
    assert run([*POST_TRAINING]) == 0
    without = Path("out.safetensors").read_bytes()
    assert run([*POST_TRAINING, "--force", "--require-size", "1MB"]) == 0
    assert Path("out.safetensors").read_bytes() == without
    assert not Path("out.safetensors.rejected").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*POST_TRAINING, "--require-top1", "9"), "--require-top1 and --require-drop need data to measure on"),
        (("test_resnet", "--from-scratch", "--require-drop", "1"), "--from-scratch has no dense model to compare with"),
        (("test_resnet", "--require-size", "3x"), "'3x' is no size: expected 250000, 250KB, 1.5MB or 1MiB"),
    ],
)
def test_a_gate_that_cannot_be(words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(list(words)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize(
    ("fallen", "has_price", "said"),
    [
        (0.05, False, ""),
        (-0.2, False, ""),
        (0.3531, False, "warning: top-1 fell by 35.3 points; try more --bits, or more --epochs"),
        (0.06, True, "warning: top-1 fell by 6.0 points; try a larger target or a lower --rate, or more --epochs"),
    ],
)
def test_a_hard_loss_is_warned_of(
    fallen: float, has_price: bool, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    warn_of_loss(fallen, "test_resnet", has_price)
    err = capsys.readouterr().err
    assert err.startswith(said)
    assert bool(err) == bool(said)
