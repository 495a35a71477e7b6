"""cluster_weights and its kin: how many values, where they start, and what is stripped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.api import job_of
from compressor.api.clustering import (
    CentroidInitialization,
    ClusteringConfig,
    cluster_weights,
    cluster_weights_,
    strip_clustering,
)
from compressor.clustering.kmeans1d import optimal_codebook
from compressor.formats.errors import UsageError
from tests.helpers.wrapped import CLUSTERINGS, images, net, sparse_net, train, weights


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in CLUSTERINGS if kind != "quantized"])
def test_strips_after_a_plain_save_of_the_state_dict(kind: str, assign: bool, tmp_path: Path) -> None:
    trained = CLUSTERINGS[kind](sparse_net())
    train(trained)
    torch.save(trained.state_dict(), tmp_path / "model.pt")
    fresh = CLUSTERINGS[kind](net(seed=7))  # other weights, none of them zero
    state = torch.load(tmp_path / "model.pt", weights_only=True)  # noqa: TID251  (as a user would)
    fresh.load_state_dict(state, assign=assign)
    stripped = strip_clustering(fresh).eval()
    assert torch.equal(stripped(images()), trained(images()))


def test_no_more_values_than_clusters() -> None:
    whole, channels = (cluster_weights(net(), 5, cluster_per_channel=per_channel) for per_channel in (False, True))
    for model in (whole, channels):
        train(model)
    assert [len(weight.unique()) for weight in weights(strip_clustering(whole))] == [5, 5]
    for weight in weights(strip_clustering(channels)):
        assert all(len(channel.unique()) <= 5 for channel in weight)
        assert len(weight.unique()) > 5


def test_zeros_are_kept_where_asked() -> None:
    kept, free = (cluster_weights(sparse_net(), 4, preserve_sparsity=preserve) for preserve in (True, False))
    for model in (kept, free):
        train(model)
    zeros = [weight == 0 for weight in weights(sparse_net())]
    for zero, here, there in zip(zeros, weights(strip_clustering(kept)), weights(strip_clustering(free)), strict=True):
        assert (here[zero] == 0).all()
        assert len(here.unique()) <= 4, "zero is one of the clusters"
        assert not (there[zero] == 0).all()


@pytest.mark.parametrize(
    ("start", "init"),
    [(CentroidInitialization.LINEAR, "linear"), (CentroidInitialization.DENSITY_BASED, "density"),
     (CentroidInitialization.KMEANS_PLUS_PLUS, "optimal"), ("LINEAR", "linear")],
)  # fmt: skip
def test_starts_are_those_of_the_engine(start: CentroidInitialization, init: Any) -> None:
    values = torch.randn(4000, generator=torch.Generator().manual_seed(3)) ** 3
    layer = nn.Linear(80, 50, bias=False)
    with torch.no_grad():
        layer.weight.copy_(values.view(50, 80))
    found = cluster_weights(layer, 6, start).weight
    assert isinstance(found, Tensor)
    assert found.unique().tolist() == optimal_codebook(values.numpy(), 6, init=init).tolist()


def test_patterns_cluster_in_place() -> None:
    model = net()
    dense = weights(model)[1].clone()
    cluster_weights_(model, {r"0": ClusteringConfig(4), r".*\.weight": ClusteringConfig(9, cluster_per_channel=True)})
    assert len(weights(model)[0].unique()) == 4
    assert [len(channel.unique()) for channel in weights(model)[1]] == [9] * 4
    assert not torch.equal(weights(model)[1], dense)
    train(model)
    assert torch.equal(strip_clustering(model)(images()), model(images()))


def test_layers_may_be_wrapped_alone() -> None:
    model = net()
    model[4] = cluster_weights(model.get_submodule("4"), 4)
    train(model)
    stripped = strip_clustering(model)
    assert torch.equal(stripped(images()), model(images()))
    assert [len(weight.unique()) > 4 for weight in weights(stripped)] == [True, False]
    with pytest.raises(UsageError, match="not wrapped itself, but 4 in it"):
        job_of(model)


def test_a_random_start_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"^cluster_centroids_init=RANDOM is not offered: take KMEANS_PLUS_PLUS"):
        ClusteringConfig(4, CentroidInitialization.RANDOM)
