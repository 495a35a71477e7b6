"""Weights and data that are not what they should be, found before the long work: one line and the exit code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save
from test_faults_read import Says, says

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
def test_58_damaged_weights_in_the_hubs_cache(says: Says, cached: Path, cut: int, more: tuple[str, ...]) -> None:
    """As a download that broke off leaves them."""
    cached.write_bytes(cached.read_bytes()[:cut])
    said = says(3, MODEL, "--pretrained", *more, "--scheme", "kmeans", "--bits", "2", "-o", "out")
    assert said.startswith(f"error: --pretrained: the weights of {MODEL} in the hub's cache are damaged (")
    assert f"): delete {cached.parents[2]} and run again, to fetch them anew" in said
    assert not Path("out").exists()


def test_55_folders_of_pictures_that_lack_something(says: Says) -> None:
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


def test_55_data_sets_of_torchvision(says: Says) -> None:
    for name, text in (("cifar10", "Dataset not found or corrupted"), ("cifar11", "Unknown torchvision dataset")):
        said = says(4, MODEL, "--dataset", f"torch/{name}", "--data-dir", ".")
        assert said.startswith(f"error: data set torch/{name}, split train: {text}")


def test_52_bits_out_of_range(says: Says) -> None:
    for scheme, bits in (("learnt", "17"), ("learnt", "0"), ("fixed", "1"), ("ttq", "3"), ("inq", "1")):
        said = says(2, MODEL, "--scheme", scheme, "--bits", bits)
        assert said.startswith(f"error: scheme '{scheme}'"), said
        assert f"got {bits}" in said
