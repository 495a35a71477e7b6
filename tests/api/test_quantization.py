"""quantize_apply: which layers, and to how many values."""

from __future__ import annotations

import torch
from torch import nn

from compressor.api import job_of
from compressor.api.quantization import (
    DefaultNBitQuantizeScheme,
    quantize_annotate_layer,
    quantize_annotate_model,
    quantize_apply,
    quantize_model,
)
from tests.helpers.wrapped import images, net, train, weights


def test_only_annotated_layers_are_quantized() -> None:
    model = net()
    model[4] = quantize_annotate_layer(model[4], DefaultNBitQuantizeScheme(num_bits_weight=2))
    quantized = quantize_apply(model)
    dense, rounded = weights(model), weights(quantized)
    assert torch.equal(rounded[0], dense[0])
    assert len(rounded[1].unique()) <= 4 * 2, "four values for each of two runs of 256 weights"
    both = quantize_apply(quantize_annotate_model(model), DefaultNBitQuantizeScheme(num_bits_weight=4))
    assert 4 < len(weights(both)[0].unique()) <= 16
    assert torch.equal(weights(both)[1], rounded[1]), "a mark set before stands"
    train(both)
    expected = both(images())
    job_of(both).finish()
    assert torch.equal(both(images()), expected)
    assert not any("quantize" in name for layer in both.modules() for name in vars(layer))


def test_a_mark_within_a_mark_counts() -> None:
    inner = quantize_annotate_layer(nn.Linear(16, 16), DefaultNBitQuantizeScheme(1))
    quantized = quantize_apply(quantize_annotate_layer(nn.Sequential(inner, nn.Linear(16, 16))))
    first, second = (len(weight.unique()) for weight in weights(quantized))
    assert first == 2
    assert second > 100


def test_eight_bits_are_the_default() -> None:
    assert DefaultNBitQuantizeScheme().num_bits_weight == 8
    layer = nn.Linear(256, 1, bias=False)
    layer.weight.data = torch.arange(256.0)[None]  # a bucket of 256 evenly spaced weights is exact at 8 bits
    assert len(weights(quantize_model(layer))[0].unique()) == 256
