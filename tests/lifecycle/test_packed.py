"""What goes into a packed file besides tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

import compressor
from compressor import Compressor, Policy, Rule
from compressor.formats.content import Content, SharedTensor, Table
from compressor.formats.file.reader import PackedFile
from compressor.lifecycle.packed import Packed


def test_preprocessing_that_prepares_no_image_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = timm.create_model("test_resnet")
    preprocessing = {
        "input_size": (3, 96, 160), "mean": (0.5, 0.25, 1), "std": (0.0, 1.0, 1.0), "interpolation": "box",
        "crop_pct": 1e308, "crop_mode": "border",
    }  # fmt: skip
    model.pretrained_cfg = {**model.pretrained_cfg, **preprocessing}
    packed = Compressor(model, Policy([Rule("*", scheme="kmeans", bits=2)]), teacher=None).prepare().finish()
    with PackedFile.from_bytes(packed.to_bytes()) as file:
        assert file.preprocessing == {
            "input_size": [3, 96, 160], "mean": [0.5, 0.25, 1], "interpolation": "box", "crop_mode": "border",
        }  # fmt: skip
    assert [record.message.partition(" of ")[0] for record in caplog.records] == ["std", "crop_pct"]


@pytest.mark.parametrize(("in_chans", "kept"), [(1, set()), (3, {"input_size", "mean", "std"})])
def test_preprocessing_for_other_channels_is_left_out(in_chans: int, kept: set[str]) -> None:
    model = timm.create_model("test_resnet", in_chans=in_chans, num_classes=10)
    packed = Compressor(model, Policy([Rule("*", scheme="kmeans", bits=2)]), teacher=None).prepare().finish()
    with PackedFile.from_bytes(packed.to_bytes()) as file:
        assert file.preprocessing is not None
        assert file.preprocessing.keys() == {"interpolation", "crop_pct", "crop_mode"} | kept


def test_halving_leaves_tied_weights_as_the_file_has_them(tmp_path: Path) -> None:
    """A module that is held twice has two names for each tensor, and one of them is shared."""

    def tied() -> nn.Module:
        torch.manual_seed(0)
        block = nn.Linear(24, 24)
        return nn.Sequential(block, nn.ReLU(), block)

    job = Compressor(tied(), Policy([Rule("*", scheme="kmeans", bits=4)]), teacher=None).prepare()
    job.finish(half_untouched=True).save(tmp_path / "file")
    loaded = compressor.load(tmp_path / "file", model=tied()).state_dict()
    for name, tensor in job.model.state_dict().items():
        assert torch.equal(loaded[name], tensor), name
    assert torch.equal(loaded["0.bias"], loaded["0.bias"].half().float())


def test_what_is_noted_is_in_the_bytes() -> None:
    site, book = SharedTensor((2,), 0, np.array([0, 1], np.uint8)), Table.of([-1.0, 1.0])
    packed = Packed(Content({"weight": site}, (book,), recipe={"stage": []}, provenance={"seed": 3}))
    before = packed.to_bytes()
    assert packed.to_bytes() is before, "packing takes long"
    packed.note(top1={"packed": 0.5})
    with PackedFile.from_bytes(packed.to_bytes()) as file:
        assert file.provenance == {"seed": 3, "top1": {"packed": 0.5}}
        assert file.recipe == {"stage": []}
    packed.note(recipe={"stage": [{"epochs": 1}]}, seed=4)
    with PackedFile.from_bytes(packed.to_bytes()) as file:
        assert file.provenance == {"seed": 4, "top1": {"packed": 0.5}}
        assert file.recipe == {"stage": [{"epochs": 1}]}
