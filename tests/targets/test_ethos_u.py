"""The estimate for Ethos-U: shared values stay shared as int8, and the bytes are those of Vela's own coder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compressor.deployment.estimate import estimate
from compressor.targets.ethos_u import quantised
from tests.helpers.file_commands import pack_module

mlw_codec = pytest.importorskip("ethosu.mlw_codec", reason="needs the extra [ethos-u]")


def test_equal_weights_stay_equal_with_one_scale_and_do_not_with_one_a_channel() -> None:
    values = np.array([-0.9, -0.2, 0.1, 0.7], np.float32)
    weights = values[np.random.default_rng(0).integers(4, size=(32, 40))]
    weights[::2] = np.minimum(weights[::2], values[2])  # every other channel has another largest weight
    weights[::2, :20] = np.maximum(weights[::2, :20], values[1])
    weights[0] = values[2]
    assert len(np.unique(quantised(weights))) == 4
    assert len(np.unique(quantised(weights, by_channel=True))) > 4
    assert np.abs(quantised(weights)).max() == 127
    error = np.abs(quantised(weights) * (0.9 / 127) - weights).max()
    assert error <= 0.5 * 0.9 / 127 + 1e-6
    assert not quantised(np.zeros((2, 3), np.float32)).any()


def test_layers_are_about_as_large_as_by_the_coder_without_an_order(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, packed = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(256, 64)), tmp_path / "n.safetensors"
    pack_module(packed, module, 2)
    found = estimate(packed, "ethos-u")
    state = {name: tensor.numpy() for name, tensor in loaded(packed).items()}
    for layer in found.layers:
        flat = np.rint(state[layer.site] / (np.abs(state[layer.site]).max() / 127)).astype(int).ravel().tolist()
        direct = len(mlw_codec.encode(flat))
        assert layer.per_tensor == pytest.approx(direct, rel=0.1)
        assert layer.uncoded == len(flat)
        assert layer.per_tensor < 0.4 * layer.uncoded


def test_a_depthwise_layer_is_not_padded_to_eight_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, packed = nn.Sequential(nn.Conv2d(256, 256, 5, groups=256)), tmp_path / "n.safetensors"
    pack_module(packed, module, 4)
    (layer,) = estimate(packed, "ethos-u").layers
    assert 0.4 < layer.per_tensor / layer.uncoded < 0.7


def loaded(packed: Path) -> dict[str, torch.Tensor]:
    from compressor.formats.loader import load_state_dict

    return load_state_dict(packed)
