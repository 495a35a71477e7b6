"""The configuration beside unpacked weights is one that timm reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from compressor.models.local_dir import CONFIG, WEIGHTS, local_config

PREPROCESSING = {
    "input_size": [3, 64, 64], "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "crop_pct": 0.7,
    "label_names": ["ant", "bee"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("test_resnet", {"num_classes": 2}),
        ("test_vit", {"num_classes": 2, "img_size": 64}),
        ("test_efficientnet", {"num_classes": 2, "act_layer": "relu"}),
        ("inception_v3", {"num_classes": 2}),  # timm's weights have other classes, and a test size of their own
        ("test_convnext", {"num_classes": 2, "depths": [1, 1, 1, 1]}),
    ],
)
def test_timm_builds_the_same_model(name: str, args: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, **args).eval()
    save_file(model.state_dict(), tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps(local_config({"name": name, "args": args}, PREPROCESSING)))
    theirs: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, 3, 75, 75) if name == "inception_v3" else torch.randn(2, 3, 64, 64)
    assert torch.equal(theirs(x), model(x))
    cfg = theirs.pretrained_cfg
    assert {key: list(one) if isinstance(one := cfg[key], tuple) else one for key in PREPROCESSING} == PREPROCESSING
    assert cfg["num_classes"] == 2
    assert not {"test_input_size", "test_crop_pct", "label_offset"} & cfg.keys()
    tested = timm.data.resolve_data_config(model=theirs, use_test_size=True)  # type: ignore[no-untyped-call]
    assert tuple(tested["input_size"]) == (3, 64, 64)
