"""Weights and data that are not what they should be, found before the long work: one line and the exit code."""

from __future__ import annotations

import os
import re
import ssl
import subprocess
import sys
from email.message import Message
from http.client import BadStatusLine
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock
from urllib.error import HTTPError, URLError

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load, save

from compressor import Compressor, Policy, Rule
from compressor.cli.main import run
from compressor.formats.errors import PolicyError
from compressor.formats.io.hub import is_reachable
from compressor.models.hub import create_pretrained
from tests.faults.test_damaged_files import Says, says

__all__ = ["says"]  # the fixture

MODEL = "test_resnet"


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of weights in a cache of the hub's layout, for a model that timm knows there."""
    cfg: Any = timm.models.get_pretrained_cfg(MODEL)
    repo = tmp_path / "hub" / f"models--{cfg.hf_hub_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    (snapshot / "model.safetensors").write_bytes(save(timm.create_model(MODEL).state_dict()))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TIMM_COMPRESSOR_CACHE", str(tmp_path / "cache"))
    return snapshot / "model.safetensors"


@pytest.mark.parametrize("cut", [0, 7, 1000, -5])
@pytest.mark.parametrize("more", [(), ("--dry-run",), ("--dataset", "digits")], ids=["alone", "dry run", "baseline"])
def test_damaged_weights_in_the_hub_cache(says: Says, cached: Path, cut: int, more: tuple[str, ...]) -> None:
    """As a download that broke off leaves them."""
    cached.write_bytes(cached.read_bytes()[:cut])
    said = says(3, MODEL, "--pretrained", *more, "--scheme", "kmeans", "--bits", "2", "-o", "out")
    assert said.startswith(f"error: --pretrained: the weights of {MODEL} in the hub's cache are damaged (")
    assert f"): delete {cached.parents[2]} and run again, to fetch them anew" in said
    assert not Path("out").exists()


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens where the hub should be; to wait for it, as its client does, is a failure."""
    for name, value in (("HF_HUB_OFFLINE", False), ("ENDPOINT", "http://127.0.0.1:9")):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr("time.sleep", lambda *_: pytest.fail("waited"))


@pytest.mark.usefixtures("no_hub")
def test_the_hub_cannot_be_reached(says: Says, cached: Path) -> None:
    words = (MODEL, "--pretrained", "--scheme", "kmeans", "--bits", "2", "-o", "out")
    cached.unlink()
    said = says(4, *words)
    assert said.startswith(f"error: the pretrained weights of {MODEL} are not in the hub's cache {cached.parents[3]}")
    assert ", and http://127.0.0.1:9 cannot be reached: set HF_HOME " in said
    assert not constants.HF_HUB_OFFLINE, "the hub may be there next time"
    cached.write_bytes(save(timm.create_model(MODEL).state_dict()))
    assert run(list(words)) == 0


@pytest.mark.usefixtures("no_hub")
def test_weights_in_the_cache_are_those_of_the_hub(cached: Path) -> None:
    """By any of the names that timm looks for, with the caller's own settings of the model."""
    wanted = load(cached.read_bytes())
    model = create_pretrained(MODEL, {"pretrained_cfg_overlay": {"crop_pct": 0.5}})
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    assert cast(Any, model).pretrained_cfg["crop_pct"] == 0.5
    torch.save(wanted, cached.with_name("pytorch_model.bin"))
    cached.unlink()
    model = create_pretrained(MODEL, {})
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


def test_offline_mode_is_respected(says: Says, cached: Path) -> None:
    cached.unlink()
    said = says(4, MODEL, "--pretrained", "--scheme", "kmeans", "--bits", "2", "-o", "out")
    assert "and HF_HUB_OFFLINE is set: set HF_HOME" in said


@pytest.mark.parametrize(
    ("error", "there"),
    [
        (HTTPError("", 405, "", Message(), None), True),
        (URLError(ssl.SSLCertVerificationError()), True),
        (URLError(OSError("no route")), False),
        (TimeoutError(), False),
        (BadStatusLine("SSH-2.0"), False),
    ],
)
def test_which_errors_mean_that_the_hub_is_unreachable(
    monkeypatch: pytest.MonkeyPatch, error: Exception, there: bool
) -> None:
    """Whatever it answers: the hub's client may have a token, or know other certificates."""
    monkeypatch.setattr("compressor.formats.io.hub.urlopen", Mock(side_effect=error))
    assert is_reachable() is there


def test_image_folders_that_lack_something(says: Says) -> None:
    for split in ("train", "val"):
        Path("data", split, "a").mkdir(parents=True)
    said = says(4, MODEL, "--data-dir", "data")
    assert said.startswith("error: data set data, split train: Found 0 images in subfolders of data/train.")
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save("data/train/a/0.png")
    said = says(4, MODEL, "--data-dir", "data")
    assert said.startswith("error: data set data, split validation: Found 0 images in subfolders of data/val.")
    os.rename("data/val", "data/other")
    said = says(4, MODEL, "--data-dir", "data")
    assert said == "error: data: no folder for validation; expected train/CLASS/*.jpg and val/CLASS/*.jpg\n"


def test_torchvision_data_sets(says: Says) -> None:
    for name, text in (("cifar10", "Dataset not found or corrupted"), ("cifar11", "Unknown torchvision dataset")):
        said = says(4, MODEL, "--dataset", f"torch/{name}", "--data-dir", ".")
        assert said.startswith(f"error: data set torch/{name}, split train: {text}")


EMBEDDING = """
import sys, torch
from pathlib import Path
from torch import nn
import compressor
from compressor import Compressor, Policy, Rule
from compressor.clustering import kmeans1d

ROWS, WIDTH, FILE = 62_500, 64, sys.argv[1]
torch.set_num_threads(1)
kmeans1d.MAX_WEIGHTS = 1 << 18  # so that these four million weights are as many as a billion are otherwise

def status(field):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024

def job_of(rows):
    return Compressor(nn.Sequential(nn.Embedding(rows, WIDTH)), Policy([Rule("*", "learnt", bits=4)]), teacher=None)

job_of(100).prepare().finish().save(FILE)  # what is loaded late is loaded now
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
job_of(ROWS).prepare().finish().save(FILE, force=True)
compressor.load(FILE, model=nn.Sequential(nn.Embedding(ROWS, WIDTH)))
print((status("VmHWM") - before) / (ROWS * WIDTH))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_a_huge_embedding(tmp_path: Path) -> None:
    """Memory grows by so many bytes a weight; what is computed of them is computed in pieces."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", EMBEDDING, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 34


def test_a_model_without_weights_to_share(says: Says) -> None:
    Path("r.toml").write_text("[[stage]]\n[[stage.rule]]\nignore = true\n")
    said = says(2, MODEL, "--recipe", "r.toml")
    assert re.match(r"error: nothing to share: all \d+ tensors are left alone; \S+: ", said)
    with pytest.raises(PolicyError, match=r"^nothing to share: no weights of two or more dimensions except norms"):
        Compressor(torch.nn.Sequential(torch.nn.BatchNorm1d(4)), Policy([Rule("*", "learnt", bits=4)]))


def test_unknown_model(says: Says) -> None:
    said = says(4, "resnet34x")
    assert said == f"error: timm {timm.__version__} has no model 'resnet34x'. Did you mean 'resnet34'?\n"


def test_bits_out_of_range(says: Says) -> None:
    for scheme, bits in (("learnt", "17"), ("learnt", "0"), ("fixed", "1"), ("ttq", "3"), ("inq", "1")):
        said = says(2, MODEL, "--scheme", scheme, "--bits", bits)
        assert said.startswith((f"error: scheme '{scheme}'", "error: Invalid value for '--bits'")), said
        assert f"got {bits}" in said or f"'{bits}', expected" in said
