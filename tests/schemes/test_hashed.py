"""HashedNets: the formula weight by weight, its gradient exactly, both starts, and what a file stores of it."""

from __future__ import annotations

import logging
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compressor.compressor import Compressor
from compressor.formats.codecs.base import Stream
from compressor.formats.codecs.hashed import Hashed as Codec
from compressor.formats.codecs.hashed import hashed_indices
from compressor.formats.errors import PolicyError
from compressor.formats.file.reader import PackedFile
from compressor.formats.inference.virtual_weight import mirrored
from compressor.ops.gather_scatter import lookup
from compressor.policy.policy import Policy, Rule
from compressor.schemes.hashed import MOST_VALUES, HashedNets
from compressor.sharing.curvature import Curvature
from compressor.sharing.group import Group
from compressor.sharing.registry import make_scheme
from compressor.sharing.sites import find_tensors

GOLDEN = [2300, 38793, 43504, 16898, 37410, 17702, 36760, 25015]  # of "fc.weight", seed 0, 65,536 codewords


def named(name: str, layer: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict([(name, layer)]))


def group_of(model: nn.Module, from_scratch: bool = False, importance: Tensor | None = None, **settings: Any) -> Group:
    scheme = HashedNets(**settings)
    group = Group(scheme, find_tensors(model)[:1], from_scratch=from_scratch)
    scheme.fit(group, None if importance is None else {group.sites[0]: Curvature(importance)})
    return group


def linear(inputs: int, outputs: int, name: str = "fc") -> nn.Module:
    torch.manual_seed(0)
    return named(name, nn.Linear(inputs, outputs, bias=False))


def weight_of(group: Group) -> Tensor:
    return group.weight(group.sites[0], group.master_weight(group.sites[0]))


def value_and_sign(group: Group) -> tuple[Tensor, Tensor]:
    """The value h(i) and the sign xi(i) of every weight, from the codec's own numpy path."""
    values = len(group.values)
    found = hashed_indices(group.sites[0].name, group.weights, 2 * values, group.scheme.seed)  # type: ignore[attr-defined]
    indices = torch.from_numpy(found.astype(np.int64))
    return indices % values, torch.where(indices < values, 1.0, -1.0)


@pytest.mark.parametrize("layer", [nn.Linear(30, 20), nn.Conv2d(4, 8, 3), nn.Conv1d(5, 7, 2), nn.Embedding(9, 11)])
@pytest.mark.parametrize("seed", [0, 42, (1 << 63) - 1])
def test_weights_are_signed_values_that_the_hash_chooses(layer: nn.Module, seed: int) -> None:
    group = group_of(named("layer", layer), seed=seed, compression=7.3)
    values = group.codebook().detach()
    assert len(values) == -(-group.weights * 10 // 73)
    position, sign = value_and_sign(group)
    assert torch.equal(weight_of(group).reshape(-1), sign * values[position])
    assert len(weight_of(group).abs().unique()) <= len(values)


def test_golden_indices_and_signs() -> None:
    """Read for ever: a file holds only the seed."""
    group = group_of(linear(256, 256), codewords=1 << 15)
    assert group.indices(group.sites[0]).view(-1)[:8].tolist() == GOLDEN
    with torch.no_grad():
        group.values.copy_(torch.arange(1 << 15) + 1)
    half = 1 << 15
    wanted = [index + 1 if index < half else half - 1 - index for index in GOLDEN]
    assert weight_of(group).view(-1)[:8].tolist() == wanted


@settings(max_examples=25, deadline=None)
@given(
    positions=st.lists(st.integers(0, (1 << 62) - 1), min_size=1, max_size=20),
    codewords=st.integers(1, 1 << 20),
    seed=st.integers(0, (1 << 64) - 1),
    name=st.text(st.characters(codec="utf-8"), max_size=20),
)
def test_torch_and_numpy_hash_alike(positions: list[int], codewords: int, seed: int, name: str) -> None:
    stream = Stream(name, 0, codewords)
    in_numpy = Codec(seed).generate(stream, np.array(positions, np.int64))
    in_torch = Codec(seed).generate(stream, torch.tensor(positions))
    assert in_torch.tolist() == in_numpy.tolist()
    assert all(0 <= index < codewords for index in in_numpy)


@pytest.mark.parametrize("threads", [1, 2])
def test_gradient_is_the_signed_sum_exactly(threads: int) -> None:
    """In float64 with whole numbers no order of summation matters: equal to the bit."""
    group = group_of(linear(40, 50))
    position, sign = value_and_sign(group)
    gradient = torch.from_numpy(np.random.default_rng(0).integers(-1000, 1000, group.weights)).double()
    values = torch.randn(len(group.values), dtype=torch.float64, requires_grad=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        lookup(mirrored(values), group.indices(group.sites[0]).view(-1)).backward(gradient)
    finally:
        torch.set_num_threads(before)
    assert values.grad is not None
    assert torch.equal(values.grad, torch.bincount(position, sign * gradient, len(values)))


def test_a_step_of_gradient_descent_is_that_of_a_weight() -> None:
    group = group_of(linear(40, 50), compression=10)
    position, sign = value_and_sign(group)
    gradient = torch.randn(50, 40)
    weight_of(group).backward(gradient)
    sums = torch.bincount(position, sign * gradient.reshape(-1), len(group.values))
    assert group.values.grad is not None
    torch.testing.assert_close(group.values.grad, sums.float() / 10)


def test_projection_of_trained_weights_leaves_no_residual_along_any_value() -> None:
    group = group_of(linear(64, 32))
    position, sign = value_and_sign(group)
    residual = (group.master_weight(group.sites[0]) - weight_of(group)).detach().view(-1).double()
    left = torch.bincount(position, sign * residual, len(group.values))
    assert left.abs().max() < 1e-5


def test_important_weights_count_for_more() -> None:
    model = linear(64, 32)
    importance = torch.zeros(32, 64)
    importance[:16] = 1
    group = group_of(model, importance=importance)
    position, sign = value_and_sign(group)
    residual = (group.master_weight(group.sites[0]) - weight_of(group)).detach() * importance
    left = torch.bincount(position, sign * residual.view(-1), len(group.values))
    assert left.abs().max() < 1e-5


@pytest.mark.parametrize("compression", [1.5, 8, 64, 2000])
def test_from_scratch_keeps_the_energy_of_the_dense_start(compression: float) -> None:
    group = group_of(linear(100, 60), from_scratch=True, compression=compression)
    dense = group.master_weight(group.sites[0]).detach()
    assert float(weight_of(group).detach().double().square().mean()) == pytest.approx(
        float(dense.double().square().mean())
    )


def test_from_scratch_values_have_one_spread_however_many_weights_they_have() -> None:
    group = group_of(linear(400, 500), from_scratch=True, compression=2)
    position, _ = value_and_sign(group)
    occupancy = torch.bincount(position, minlength=len(group.values))
    dense = float(group.master_weight(group.sites[0]).detach().square().mean())
    values = group.codebook().detach()
    for count in range(1, 6):
        assert float(values[occupancy == count].square().mean()) == pytest.approx(dense, rel=0.05)
    assert (values[occupancy == 0] == 0).all()


def test_layers_of_one_shape_have_patterns_of_their_own() -> None:
    groups = [group_of(linear(50, 50, "a")), group_of(linear(50, 50, "b")), group_of(linear(50, 50, "a"), seed=1)]
    patterns = [group.indices(group.sites[0]).view(-1) for group in groups]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert float((patterns[one] == patterns[other]).float().mean()) < 0.01
    repeated = group_of(linear(50, 50, "a"))
    assert torch.equal(patterns[0], repeated.indices(repeated.sites[0]).view(-1))


def test_values_and_signs_are_used_evenly() -> None:
    position, sign = value_and_sign(group_of(linear(500, 400), codewords=1000))
    expected = 200_000 / 1000
    chi_square = float(((torch.bincount(position, minlength=1000) - expected).square() / expected).sum())
    assert 840 < chi_square < 1160  # 999 degrees of freedom, standard deviation 45: p > 1e-3 at either end
    assert abs(float(sign.sum())) < 4 * 200_000**0.5


def test_state_is_the_values() -> None:
    group = group_of(linear(40, 50))
    assert set(group.state_dict()) == {"unit", "values"}
    assert len(group.values) == 250


def test_a_file_stores_values_and_seed(tmp_path: Path) -> None:
    """The seed's example: 28 inputs and a bias node, 100, 50, 10 and 1 nodes, 8 values a layer."""
    sizes = [29, 100, 50, 10, 1]
    layers = [nn.Linear(inputs, outputs, bias=False) for inputs, outputs in pairwise(sizes)]
    assert sum(layer.weight.numel() for layer in layers) == 8410
    job = Compressor(nn.Sequential(*layers), Policy([Rule("*", scheme="hashed", codewords=8)]), from_scratch=True)
    job.prepare().finish().save(tmp_path / "higgs.safetensors")
    with PackedFile.open(tmp_path / "higgs.safetensors") as file:
        sizes_of_file = file.sizes()
        assert sizes_of_file.codebooks == 4 * 32
        assert sizes_of_file.indices == 8 * 4
        assert sizes_of_file.untouched == 0
        for name, weights in job.model.state_dict().items():
            assert torch.equal(torch.from_numpy(file.tensor(name)), weights)


def test_trains_from_scratch() -> None:
    torch.manual_seed(0)
    teacher, inputs = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)), torch.randn(256, 16)
    wanted = teacher(inputs).detach()
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))
    job = Compressor(model, Policy([Rule("*", scheme="hashed", bits=8)]), teacher=None, from_scratch=True).prepare()
    opt = torch.optim.AdamW(job.param_groups(lr=0.01))
    job.attach(opt, 200)
    losses = []
    for _ in range(200):
        opt.zero_grad()
        loss = (job.model(inputs) - wanted).square().mean()
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 10


def test_pruned_weights_are_stored_with_their_indices() -> None:
    job = Compressor(linear(30, 20), Policy([Rule("*", scheme="hashed", sparsity=0.5)]), teacher=None).prepare()
    site = job.groups[0].sites[0]
    position, sign = value_and_sign(job.groups[0])
    values, pruned = job.groups[0].codebook().detach(), job.groups[0].pruned(site)
    content = job.finish().content
    weights = job.model.state_dict()["fc.weight"]
    assert content.sites["fc.weight"].codec is None
    assert torch.equal(weights, (sign * values[position]).view(20, 30).masked_fill(pruned, 0))
    assert int(pruned.sum()) == 300


def test_trained_weights_get_one_line_of_caution(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    policy = Policy([Rule("*", scheme="hashed")])
    with caplog.at_level(logging.WARNING):
        Compressor(model, policy, teacher=None, from_scratch=True).prepare()
        assert not caplog.records
        Compressor(model, policy, teacher=None).prepare()
    assert [record.getMessage().count("--from-scratch") for record in caplog.records] == [1]


def test_settings() -> None:
    assert make_scheme("hashed", {"bits": 4}) == HashedNets(compression=8.0)
    assert make_scheme("hashed", {"bits": 3}).stored_values(3200) == 300
    assert HashedNets(compression=64).stored_values(4096 * 4096) == 1 << 18
    assert HashedNets(codewords=8).stored_values(5000) == 8
    for wrong in ({"compression": 0.5}, {"codewords": 0}, {"codewords": MOST_VALUES + 1}, {"seed": -1}, {"bits": 0}):
        with pytest.raises(PolicyError, match=next(iter(wrong))):
            make_scheme("hashed", wrong)


def test_too_many_values_are_refused_with_the_layer_and_the_way_out() -> None:
    model = linear(1100, 1000)
    policy = Policy([Rule("*", scheme="hashed", compression=2)])
    with pytest.raises(PolicyError, match=r"fc\.weight: 1,100,000 weights .* at most 524,287: take .* of 2\.1"):
        Compressor(model, policy, teacher=None)
    assert HashedNets(compression=2.1).stored_values(1_100_000) <= MOST_VALUES
