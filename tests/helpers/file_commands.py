"""Packed files, and command lines that read or write them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from torch import nn

from compressor import Compressor, Policy, Rule
from compressor.cli.main import run
from compressor.formats.content import Content, RawTensor, SharedTensor, Table

Ran = tuple[int, str, list[str]]
MODEL = "test_resnet"
ARGS: dict[str, Any] = {"num_classes": 10, "in_chans": 1}


@pytest.fixture
def type_(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs a command line and returns its exit code, stdout, and the lines of stderr."""

    def typed(*words: str) -> Ran:
        code = run(list(words))
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err.splitlines()

    return typed


@pytest.fixture(scope="session")
def timm_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the bytes of a packed timm model."""
    path = tmp_path_factory.mktemp("timm") / "resnet.safetensors"
    torch.manual_seed(0)
    pack_module(path, timm.create_model(MODEL, **ARGS), 3, ARGS)
    return path


def pack_module(path: str | Path, model: nn.Module, bits: int = 2, args: dict[str, Any] | None = None) -> None:
    job = Compressor(model, Policy([Rule("*", scheme="kmeans", bits=bits)]), model_args=args, teacher=None)
    job.prepare().finish().save(path)


def floats(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def small(**changes: Any) -> Content:
    """Packs three shared tensors of three dtypes, and untouched ones, one of them tied."""
    ramp = np.arange(64, dtype=np.uint8) % 4
    sites = {
        "one.weight": SharedTensor((8, 8), 0, ramp),
        "two.weight": SharedTensor((8, 8), 0, ramp[::-1].copy(), dtype="BF16"),
        "three.weight": SharedTensor((64,), 1, ramp, dtype="F16", block=32, scale=floats(1, 2)),
    }
    untouched = {
        "one.bias": RawTensor("F32", (2,), floats(1, np.nan).tobytes()),
        "steps": RawTensor("I64", (), np.int64(7).tobytes()),
        "mask": RawTensor("F8_E4M3", (4,), bytes(4)),
    }
    books = Table.of([-1, 0, 0.5, 2]), Table.of([-3, -1, 1, 3])
    return replace(Content(sites, books, untouched, {"tied.weight": "one.weight"}), **changes)


def damage(path: Path, *words: bytes) -> None:
    """Flips a bit of each of the bytes, at any position."""
    data = bytearray(path.read_bytes())
    for word in words:
        data[bytes(data).index(word)] ^= 1
    path.write_bytes(data)
