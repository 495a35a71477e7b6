"""Preprocessing is what timm resolves, for models of one channel too."""

from __future__ import annotations

from typing import Any

import pytest
import timm
from timm.data import resolve_data_config

from compressor.data.preprocessing import resolve_preprocessing
from compressor.formats.errors import UsageError


@pytest.mark.parametrize("name", ["resnet18", "test_vit", "inception_v3.tv_in1k", "vit_base_patch16_clip_224.openai"])
@pytest.mark.parametrize(
    "asked",
    [{}, {"img_size": 32}, {"input_size": (3, 32, 48), "mean": (0.5,)}, {"crop_pct": 0.5, "crop_mode": "border"},
     {"std": (0.1, 0.2, 0.3), "interpolation": "box"}],
)  # fmt: skip
def test_colour_images_are_resolved_by_timm(name: str, asked: dict[str, Any]) -> None:
    cfg: Any = timm.models.get_pretrained_cfg(name)
    expected = resolve_data_config(asked, cfg.to_dict())  # type: ignore[no-untyped-call]
    assert resolve_preprocessing(asked, cfg.to_dict()) == expected


def test_grey_images_have_the_size_of_the_model_and_the_mean_of_its_colours() -> None:
    own = {"input_size": [3, 96, 128], "mean": [0.1, 0.2, 0.6], "std": [0.5, 0.25, 0.75]}
    found = resolve_preprocessing({"in_chans": 1}, own)
    assert (found["input_size"], found["std"]) == ((1, 96, 128), (0.5,))
    assert found["mean"] == pytest.approx((0.3,))
    assert resolve_preprocessing({"in_chans": 1, "mean": (0.7,)}, own)["mean"] == (0.7,)


def test_channels_that_do_not_fit() -> None:
    with pytest.raises(UsageError, match=r"--mean: 3 values for images of 1 channels, expected 1 or 1"):
        resolve_preprocessing({"in_chans": 1, "mean": (0.1, 0.2, 0.3)}, {})
