"""The verbs of TensorFlow Model Optimization: what is trained is what is stripped, saved and packed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import compressor
from compressor.api import job_of
from compressor.api.clustering import (
    CentroidInitialization,
    ClusteringConfig,
    cluster_weights,
    cluster_weights_,
    strip_clustering,
)
from compressor.api.combine import Default8BitClusterPreserveQuantizeScheme, strip_clustering_cqat
from compressor.api.quantization import DefaultNBitQuantizeScheme, quantize_annotate_layer, quantize_apply
from compressor.api.sparsity import (
    ConstantSparsity,
    PolynomialDecay,
    UpdatePruningStep,
    prune_low_magnitude,
    strip_pruning,
)
from compressor.formats.errors import CompressorError, PolicyError, UsageError
from tests.helpers.wrapped import CLUSTERINGS, images, net, sparse_net, train, weights


@pytest.mark.parametrize("kind", CLUSTERINGS)
def test_what_trained_is_what_is_stripped_and_packed(kind: str, tmp_path: Path) -> None:
    given_model = sparse_net()
    before = copy.deepcopy(given_model.state_dict())
    wrapped = CLUSTERINGS[kind](given_model)
    first = [weight.clone() for weight in weights(wrapped)]
    train(wrapped)
    assert not any(torch.equal(now, then) for now, then in zip(weights(wrapped), first, strict=True)), "it trains"
    assert all(torch.equal(value, before[name]) for name, value in given_model.state_dict().items())
    if kind != "quantized":
        stripped = strip_clustering(wrapped)
        assert torch.equal(stripped(images()), wrapped(images()))
        assert list(stripped.state_dict()) == list(before)
        assert [type(layer) for layer in stripped.modules()] == [type(layer) for layer in given_model.modules()]
    expected = wrapped(images())
    packed = job_of(wrapped).finish()
    assert torch.equal(wrapped(images()), expected)
    packed.save(tmp_path / "packed.safetensors")
    loaded = compressor.load(tmp_path / "packed.safetensors", model=net(5))
    assert torch.equal(loaded(images()), expected)


def test_timm_models_are_packed_with_their_arguments(tmp_path: Path) -> None:
    import timm

    args: dict[str, Any] = {"num_classes": 10, "in_chans": 1}
    clustered = cluster_weights(timm.create_model("test_resnet", **args), 4)
    job_of(clustered).finish().save(tmp_path / "packed.safetensors")
    loaded, x = compressor.load(tmp_path / "packed.safetensors"), torch.randn(1, 1, 32, 32)
    assert torch.equal(loaded(x), clustered.eval()(x))


FAULTS: dict[str, tuple[Callable[[], Any], type[CompressorError], str]] = {
    "clusters": (lambda: cluster_weights(net(), 0), UsageError, "number_of_clusters must be .* got 0"),
    "truth": (lambda: cluster_weights(net(), True), UsageError, "number_of_clusters must be .* got True"),
    "random": (lambda: cluster_weights(net(), 4, CentroidInitialization.RANDOM), UsageError, "RANDOM is not offered"),
    "start": (lambda: cluster_weights(net(), 4, "LINEARR"), UsageError, "got 'LINEARR'. Did you mean 'LINEAR'"),
    "list": (lambda: cluster_weights([nn.Linear(9, 9)], 4), UsageError, "got list"),  # type: ignore[arg-type]
    "nothing": (lambda: cluster_weights(nn.ReLU(), 4), PolicyError, "nothing to share"),
    "twice": (lambda: cluster_weights(cluster_weights(net(), 4), 4), UsageError, "the model is wrapped by cluster_"),
    "pattern": (lambda: cluster_weights_(net(), {"conv.*": ClusteringConfig()}), PolicyError, "matches no tensor"),
    "regex": (lambda: cluster_weights_(net(), {"(": ClusteringConfig()}), PolicyError, "not a regular expression"),
    "mixed": (lambda: cluster_weights_(net(), {"0": ClusteringConfig(), "4": ClusteringConfig(preserve_sparsity=True)}),
              UsageError, "preserve_sparsity must be the same"),
    "no patterns": (lambda: cluster_weights_(net(), {}), PolicyError, "at least one rule"),
    "strip": (lambda: strip_clustering(net()), UsageError, "not wrapped by cluster_weights: it is an ordinary module"),
    "strip other": (lambda: strip_pruning(cluster_weights(net(), 4)), UsageError, "it is wrapped by cluster_weights"),
    "job": (lambda: job_of(net()), UsageError, "not wrapped itself, or has been stripped"),
    "target": (lambda: ConstantSparsity(1.0, 0), UsageError, "target_sparsity must be .* got 1.0"),
    "begin": (lambda: ConstantSparsity(0.5, -1), UsageError, "begin_step must be .* got -1"),
    "final": (lambda: PolynomialDecay(0, -0.1, 0, 9), UsageError, "final_sparsity must be"),
    "end": (lambda: PolynomialDecay(0, 0.5, 10, 9), UsageError, "end_step must be .* at least 10, got 9"),
    "forever": (lambda: PolynomialDecay(0, 0.5, 0, -1), UsageError, "end_step must be .* got -1"),
    "power": (lambda: PolynomialDecay(0, 0.5, 0, 9, power=0), UsageError, "power must be"),
    "frequency": (lambda: PolynomialDecay(0, 0.5, 0, 9, frequency=0), UsageError, "frequency must be"),
    "schedule": (lambda: prune_low_magnitude(net(), 0.5), UsageError, "must be ConstantSparsity .* got 0.5"),  # type: ignore[arg-type]
    "callback": (lambda: UpdatePruningStep(net(), torch.optim.SGD(net().parameters())), UsageError, "by prune_low"),
    "falling": (lambda: PolynomialDecay(0.6, 0.5, 0, 9), UsageError, "initial_sparsity 0.6 is above final"),
    "bits": (lambda: DefaultNBitQuantizeScheme(17), UsageError, "num_bits_weight must be .* got 17"),
    "unmarked": (lambda: quantize_apply(net()), UsageError, "no layer is marked"),
    "marked": (lambda: quantize_apply(quantize_annotate_layer(nn.ReLU())), PolicyError, "nothing to share"),
    "scheme": (lambda: quantize_apply(net(), 8), UsageError, "scheme must be one such as .* got 8"),  # type: ignore[arg-type]
    "layer scheme": (lambda: quantize_annotate_layer(nn.Linear(9, 9), Default8BitClusterPreserveQuantizeScheme()),  # type: ignore[arg-type]
                     UsageError, r"must be a DefaultNBitQuantizeScheme.*quantize_apply\(model, scheme\)"),
    "strip cqat": (lambda: strip_clustering_cqat(cluster_weights(net(), 4)), UsageError, "not wrapped by quantize_app"),
    "constant end": (lambda: ConstantSparsity(0.5, 9, end_step=8), UsageError, "end_step must be .* at least 9, got 8"),
    "constant turns": (lambda: ConstantSparsity(0.5, 0, frequency=0), UsageError, "frequency must be .* got 0"),
    "callable": (lambda: cluster_weights_(net(), lambda *_: True), UsageError, "takes a dict of .*; got function"),  # type: ignore[arg-type]
    "config alone": (lambda: cluster_weights_(net(), ClusteringConfig()), UsageError, "; got ClusteringConfig"),  # type: ignore[arg-type]
    "settings": (lambda: cluster_weights_(net(), {"number_of_clusters": 4}), UsageError,  # type: ignore[dict-item]
                 "got 4 of int for 'number_of_clusters'"),
    "dict": (lambda: cluster_weights_(net(), {"0": {"number_of_clusters": 4}}), UsageError, "got .* of dict for '0'"),  # type: ignore[dict-item]
    "no layer": (lambda: quantize_annotate_layer("fc"), UsageError, "got str"),  # type: ignore[arg-type]
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_one_clear_line(fault: str) -> None:
    call, kind, message = FAULTS[fault]
    with pytest.raises(kind, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", CLUSTERINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_wrapped_model_may_be_moved_to_another_dtype(kind: str, dtype: torch.dtype) -> None:
    wrapped = CLUSTERINGS[kind](sparse_net()).to(dtype)
    moved = [weight.clone() for weight in weights(wrapped)]
    job_of(wrapped).finish()
    assert all(torch.equal(now, then) for now, then in zip(weights(wrapped), moved, strict=True))
