"""TensorFlow's pipeline, prune, cluster, quantise: what each scheme keeps of zeros and clusters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import compressor
from compressor.api import job_of
from compressor.api.clustering import cluster_weights, strip_clustering
from compressor.api.combine import (
    Default8BitClusterPreserveQuantizeScheme,
    Default8BitPrunePreserveQuantizeScheme,
    strip_clustering_cqat,
)
from compressor.api.quantization import (
    DefaultNBitQuantizeScheme,
    quantize_annotate_layer,
    quantize_annotate_model,
    quantize_apply,
)
from compressor.api.sparsity import ConstantSparsity, prune_low_magnitude, strip_pruning
from tests.helpers.wrapped import images, net, train, weights


def pruned_and_clustered(per_channel: bool = False) -> nn.Sequential:
    """Half of the weights are 0.0, the others have seven values, of each tensor or channel."""
    pruned = strip_pruning(prune_low_magnitude(net(), ConstantSparsity(0.5, begin_step=0)))
    model = strip_clustering(cluster_weights(pruned, 8, preserve_sparsity=True, cluster_per_channel=per_channel))
    assert isinstance(model, nn.Sequential)
    return model


def zeros(model: nn.Module) -> list[float]:
    return [float((weight == 0).float().mean()) for weight in weights(model)]


def values(model: nn.Module) -> list[int]:
    return [len(weight.unique()) for weight in weights(model)]


def channel_values(model: nn.Module) -> list[int]:
    return [max(len(channel.unique()) for channel in weight) for weight in weights(model)]


def test_pcqat_keeps_zeros_and_clusters_and_trains(tmp_path: Path) -> None:
    before = pruned_and_clustered()
    assert zeros(before) == [0.5, 0.5]
    assert values(before) == [8, 8]
    scheme = Default8BitClusterPreserveQuantizeScheme(preserve_sparsity=True)
    quantized = quantize_apply(quantize_annotate_model(before), scheme=scheme)
    assert all(torch.equal(now, then) for now, then in zip(weights(quantized), weights(before), strict=True))
    train(quantized, steps=20)
    stripped = strip_clustering_cqat(quantized)
    assert zeros(stripped) == [0.5, 0.5]
    assert all(count <= 8 for count in values(stripped))
    assert all(bool((now != then).any()) for now, then in zip(weights(stripped), weights(before), strict=True))
    assert all(bool((now[then == 0] == 0).all()) for now, then in zip(weights(stripped), weights(before), strict=True))
    assert torch.equal(stripped(images()), quantized(images()))
    job_of(quantized).finish().save(tmp_path / "a.safetensors")
    assert torch.equal(compressor.load(tmp_path / "a.safetensors", model=net(5))(images()), stripped(images()))


def test_cqat_keeps_clusters_and_lets_zeros_go() -> None:
    scheme = Default8BitClusterPreserveQuantizeScheme(preserve_sparsity=False)
    quantized = quantize_apply(quantize_annotate_model(pruned_and_clustered()), scheme)
    train(quantized, steps=20)
    assert all(count <= 8 for count in values(quantized))
    assert zeros(quantized) == [0.0, 0.0]


def test_clusters_of_each_channel_are_kept_for_each_channel() -> None:
    before = pruned_and_clustered(per_channel=True)
    quantized = quantize_apply(quantize_annotate_model(before), Default8BitClusterPreserveQuantizeScheme())
    assert all(torch.equal(now, then) for now, then in zip(weights(quantized), weights(before), strict=True))
    train(quantized, steps=20)
    assert zeros(quantized) == [0.5, 0.5]
    assert all(now <= then for now, then in zip(channel_values(quantized), channel_values(before), strict=True))


def test_pqat_keeps_zeros_alone_and_plain_quantisation_nothing() -> None:
    pruned, plain = (
        quantize_apply(quantize_annotate_model(pruned_and_clustered()), scheme)
        for scheme in (Default8BitPrunePreserveQuantizeScheme(), DefaultNBitQuantizeScheme(8))
    )
    for model in (pruned, plain):
        train(model, steps=20)
        assert all(count > 30 for count in values(model))
    assert all(now >= 0.5 for now in zeros(pruned))
    assert zeros(plain) == [0.0, 0.0]


def layer_of(weight: Tensor) -> nn.Sequential:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    return nn.Sequential(layer)


@pytest.mark.parametrize("per_slice", [False, True])
def test_a_tensor_that_is_not_clustered_is_rounded_to_8_bits(per_slice: bool) -> None:
    weight = torch.linspace(-1, 1, 4 * 1024).view(4, 1024)
    if per_slice:
        weight = weight.view(1024, 4).clone()  # slices of few values, all distinct
    scheme = Default8BitClusterPreserveQuantizeScheme()
    quantized = quantize_apply(quantize_annotate_model(layer_of(weight)), scheme)
    eight_bits = quantize_apply(quantize_annotate_model(layer_of(weight)))
    assert torch.equal(weights(quantized)[0], weights(eight_bits)[0])


@pytest.mark.parametrize("value", [0.0, 0.5])
@pytest.mark.parametrize("preserve", [False, True])
def test_one_value_stays_one(value: float, preserve: bool) -> None:
    scheme = Default8BitClusterPreserveQuantizeScheme(preserve_sparsity=preserve)
    quantized = quantize_apply(quantize_annotate_model(layer_of(torch.full((4, 16), value))), scheme)
    assert weights(quantized)[0].unique().tolist() == [value]


def test_a_configuration_of_a_layer_stands() -> None:
    model = pruned_and_clustered()
    model[4] = quantize_annotate_layer(model[4], DefaultNBitQuantizeScheme(2))
    quantized = quantize_apply(quantize_annotate_model(model), Default8BitClusterPreserveQuantizeScheme())
    assert torch.equal(weights(quantized)[0], weights(model)[0])
    assert not torch.equal(weights(quantized)[1], weights(model)[1])
