"""Which weights share what, against twins that go through the weights one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor.calibration.layer_views import layer_view
from compressor.clustering.granularity import Granularity
from compressor.formats.content import decode
from compressor.schemes.kmeans import KMeans
from compressor.sharing.group import Group
from compressor.sharing.sites import find_tensors

LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(9, 10, bias=False),
    "convolution": lambda: nn.Conv2d(3, 10, 3, bias=False),
    "grouped": lambda: nn.Conv2d(4, 10, 3, groups=2, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(10, 6, 2, groups=2, bias=False),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "site": {},
    "channel": {"group_size": 1},
    "three channels": {"group_size": 3},
    "all channels": {"group_size": 10},
    "factors": {"channel_scale": True},
    "pairs": {"vector": 2},
    "threes": {"vector": 3},
    "more than channels": {"vector": 40},
    "pairs with factors": {"vector": 2, "channel_scale": True},
}


def group_of(layer: Any, pruned: float = 0.0) -> Group:
    torch.manual_seed(0)
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight))
        layer.weight[3].mul_(50)
    group = Group(KMeans(), find_tensors(layer))
    if pruned:
        (site,) = group.sites
        group.prune(site, torch.rand(site.tensor.shape) < pruned)
    return group


def slices(shape: tuple[int, ...], axis: int) -> list[np.ndarray]:
    """Returns the places of each output channel in C order."""
    return [np.take(np.arange(np.prod(shape)).reshape(shape), at, axis).ravel() for at in range(shape[axis])]


def twin(weights: Tensor, axis: int, factors: np.ndarray, books: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    """The codeword of each weight, one codeword after another: by channel, or by vector across channels."""
    places, flat = slices(tuple(weights.shape), axis), weights.double().numpy().ravel()
    result, length = np.empty(len(flat)), books.shape[2]
    per_book = settings.get("group_size", 0) or len(places)
    for start in range(0, len(places), length):
        channels = list(range(start, min(start + length, len(places))))
        book = books[0 if len(books) == 1 else start // per_book]
        for entry in range(len(places[0])):
            where = [places[channel][entry] for channel in channels]
            scaled = flat[where] / factors[channels]
            best = ((book[:, : len(where)] - scaled) ** 2).sum(1).argmin()
            result[where] = book[best, : len(where)] * factors[channels]
    return result.reshape(weights.shape)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_stored_is_the_nearest_codeword_of_each_weight(layer: str, name: str) -> None:
    group, shared = group_of(LAYERS[layer]()), Granularity(4, **SETTINGS[name])
    (site,) = group.sites
    weights = group.master_weight(site).detach()
    axis = 1 if layer == "transposed" and not shared.group_size else 0  # group_size is of axis 0, whatever that is
    codebooks = shared.fit(group, None, "optimal")
    positions = shared.nearest(group, site, codebooks)
    assert (positions.shape, positions.dtype) == (weights.shape, torch.int32)
    factor = shared.factor(group, site)
    looked_up = codebooks[positions.long()] * (1 if factor is None else factor)
    exported = shared.export(group, codebooks, {site: positions})
    tensor, book = exported.tensors[site.name], exported.books[0]
    assert np.array_equal(decode(tensor, book), looked_up.numpy())
    factors = np.ones(weights.shape[axis]) if tensor.scale is None else tensor.scale.astype(np.float64)
    assert (len(np.unique(factors)) > 1) == shared.channel_scale
    expected = twin(weights, axis, factors, book.expand().astype(np.float64), SETTINGS[name])
    np.testing.assert_allclose(looked_up.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", SETTINGS)
def test_rounding_column_by_column_is_to_the_same_codewords(layer: str, name: str) -> None:
    """The columns of error feedback, as the layer's own view cuts them."""
    group, shared = group_of(LAYERS[layer]()), Granularity(4, **SETTINGS[name])
    (site,) = group.sites
    weights, view = group.master_weight(site).detach(), layer_view(site)
    assert view is not None
    codebooks = shared.fit(group, None, "optimal")
    rounded = shared.rounding(group, site, codebooks)
    places = view.matrices(torch.arange(weights.numel()).view(weights.shape))
    result = torch.full((weights.numel(),), torch.nan)
    for column in range(places.shape[2]):
        where = places[:, :, column].reshape(-1)
        result[where] = rounded(weights.reshape(-1)[where], where)
    factor = shared.factor(group, site)
    expected = codebooks[shared.nearest(group, site, codebooks).long()] * (1 if factor is None else factor)
    assert torch.equal(result.view(weights.shape), expected)


def test_as_many_codebooks_as_groups_of_channels() -> None:
    group = group_of(nn.Conv2d(3, 10, 3))
    counts = [Granularity(4, size).codebook_count(group) for size in (0, 1, 3, 5, 9, 10, 11)]
    assert counts == [1, 10, 4, 2, 2, 1, 1]
    assert [Granularity(27, size).codebook_count(group) for size in (1, 2)] == [1, 5], (
        "27 weights of a channel are too few"
    )
    assert Granularity(26, 1).codebook_count(group) == 10


def test_each_group_of_channels_has_the_best_codebook_of_its_own() -> None:
    group = group_of(nn.Linear(9, 10, bias=False))
    (site,) = group.sites
    codebooks = Granularity(4, 3).fit(group, None, "optimal").view(4, 4)
    for number, rows in enumerate(group.master_weight(site).detach().split(3)):
        layer = nn.Linear(9, len(rows), bias=False)
        layer.weight.data = rows.clone()
        expected = Granularity(4).fit(Group(KMeans(), find_tensors(layer)), None, "optimal")
        assert torch.equal(codebooks[number], expected)


def test_factors_are_root_mean_squares_of_what_is_not_pruned() -> None:
    group = group_of(nn.Linear(9, 10, bias=False), pruned=0.4)
    (site,) = group.sites
    with torch.no_grad():
        site.tensor[5].fill_(0.0)
    Granularity(4, channel_scale=True).fit(group, None, "optimal")
    factor = group.get_buffer("scales")
    assert torch.equal(factor, factor.bfloat16().float())
    for row, weights, pruned in zip(factor, site.tensor.detach(), group.pruned(site), strict=True):
        kept = weights[~pruned]
        expected = float(kept.square().mean().sqrt()) or 1.0
        assert float(row) == pytest.approx(expected, rel=2**-8)


@pytest.mark.parametrize("vector", [1, 2])
def test_errors_count_as_much_as_in_the_weights_themselves(vector: int) -> None:
    """The third channel is in units of 16, so that an error of a codeword costs 256 times as much there."""
    layer = nn.Linear(2, 4, bias=False)
    layer.weight.data = torch.tensor([[1.0, -1.0], [1.0, 1.0], [16.0, 16.0], [1.0, 1.0]])
    group = Group(KMeans(), find_tensors(layer))
    importance = {group.sites[0]: torch.tensor([[3.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])}
    found = Granularity(1, channel_scale=True, vector=vector).fit(group, importance, "optimal")
    expected = [(3 - 1 + 1 + 1 + 2 * 256 + 1 + 1) / (3 + 1 + 2 + 2 * 256 + 2)]
    if vector == 2:
        expected = [(3 - 1 + 2 * 256) / (3 + 1 + 2 * 256), 1.0]
    assert found.tolist() == pytest.approx(expected, abs=5e-4)


CONFLICTS: dict[str, dict[str, Any]] = {
    "group_size and channel_scale": {"group_size": 2, "channel_scale": True},
    "group_size and vector": {"group_size": 2, "vector": 2},
    "vector and init=linear": {"vector": 2, "init": "linear"},
    "vector and codewords=16385": {"vector": 2, "codewords": 16_385},
}


@pytest.mark.parametrize("start", CONFLICTS)
def test_settings_that_contradict_each_other(start: str) -> None:
    settings = dict(CONFLICTS[start])
    init: Any = settings.pop("init", "optimal")
    assert Granularity(**{"codewords": 4, **settings}).conflict(init).startswith(f"{start}: ")


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_do_not(name: str) -> None:
    assert Granularity(4, **SETTINGS[name]).conflict("optimal") == ""
