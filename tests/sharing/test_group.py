"""The contract of groups, on a scheme that uses all of it: freezing in rounds, one codebook for all, a penalty."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from compressor import Compressor, Policy, Rule
from compressor.formats.errors import UsageError
from compressor.ops.gather_scatter import lookup
from compressor.ops.nearest import nearest
from compressor.sharing.curvature import Curvature
from compressor.sharing.export import SharedTensors, export_scalars
from compressor.sharing.group import Group
from compressor.sharing.group_state import GroupState
from compressor.sharing.parametrization import attach, detach
from compressor.sharing.registry import SCHEMES, register
from compressor.sharing.scheme import Scheme
from compressor.sharing.sites import Site, find_tensors


@dataclass(frozen=True)
class FreezeBySize(Scheme):
    """The largest half of the weights is frozen to -1, 0 or 1 at first, the rest when training is half over."""

    id: ClassVar[str] = "freeze-by-size"
    paper: ClassVar[str] = "none"

    def stored_values(self, weights: int) -> int:
        del weights
        return 3

    def fit(self, group: GroupState, curvature: Mapping[Site, Curvature] | None) -> None:
        del curvature
        group.set_codebook(torch.tensor([-1.0, 0.0, 1.0]), learnt=False)
        for site in group.sites:
            master = group.master_weight(site).detach()
            chosen = nearest(master, group.codebook())
            group.set_indices(site, torch.where(master.abs() >= master.abs().median(), chosen, -1), len(group.values))

    def weight(self, group: GroupState, site: Site, master: Tensor) -> Tensor:
        indices = group.indices(site)
        return torch.where(indices < 0, master, lookup(group.codebook(), indices.clamp(min=0)))

    def on_step(self, group: GroupState, progress: float) -> float | None:
        if progress >= 0.5:
            for site in group.sites:
                indices = group.indices(site)
                chosen = nearest(group.master_weight(site).detach(), group.codebook())
                group.set_indices(site, torch.where(indices < 0, chosen, indices), len(group.values))
        return None

    def penalty(self, group: GroupState, task: Tensor) -> Tensor:
        del task
        return torch.stack([group.master_weight(site).square().sum() for site in group.sites]).sum()

    def export(self, group: GroupState) -> SharedTensors:
        return export_scalars(group, group.codebook(), {site: group.indices(site) for site in group.sites})


@pytest.fixture
def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.fixture
def group(net: Any) -> Group:
    """One group over both layers."""
    scheme = FreezeBySize()
    made = Group(scheme, [site for site in find_tensors(net) if site.default])
    scheme.fit(made, None)
    attach(net, [made])
    return made


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    ],
)
def test_frozen_weights_stand_still_and_free_ones_move(net: Any, group: Group, optimizer: object) -> None:
    frozen = {site: group.indices(site) >= 0 for site in group.sites}
    before = [net[0].weight.detach().clone(), net[2].weight.detach().clone()]
    opt = optimizer(net.parameters())  # type: ignore[operator]
    for _ in range(3):
        opt.zero_grad()
        (net(torch.randn(4, 8)).square().mean() + 1e-3 * FreezeBySize().penalty(group, torch.ones(()))).backward()
        opt.step()
    for site, was, now in zip(group.sites, before, (net[0].weight, net[2].weight), strict=True):
        assert torch.equal(now[frozen[site]], was[frozen[site]])
        assert not torch.equal(now[~frozen[site]], was[~frozen[site]])
    group.scheme.on_step(group, 0.5)
    assert set(net[0].weight.unique().tolist()) <= {-1.0, 0.0, 1.0}


def test_one_codebook_is_shared_by_all_sites(net: Any, group: Group) -> None:
    group.scheme.on_step(group, 1.0)
    shared = group.scheme.export(group)
    assert len(shared.books) == 1
    assert {name: tensor.book for name, tensor in shared.tensors.items()} == {"0.weight": 0, "2.weight": 0}
    assert len([key for key in net.state_dict() if key.endswith("values")]) == 1


def test_state_travels_as_tensors(net: Any, group: Group) -> None:
    state = copy.deepcopy(net.state_dict())
    group.scheme.on_step(group, 1.0)
    assert (group.indices(group.sites[0]) >= 0).all()
    net.load_state_dict(state)
    assert (group.indices(group.sites[0]) < 0).any()


def test_a_codebook_may_grow_between_save_and_load(net: Any, group: Group) -> None:
    group.set_codebook(torch.linspace(-1, 1, 9), learnt=False)
    state = copy.deepcopy(net.state_dict())
    group.set_codebook(torch.tensor([-1.0, 0.0, 1.0]), learnt=False)
    net.load_state_dict(state)
    assert torch.equal(group.codebook(), torch.linspace(-1, 1, 9))


@pytest.mark.parametrize("wrong", [-2, 4, 100])
def test_indices_of_no_codeword_are_refused(wrong: int) -> None:
    """Machine code would read memory that is not the codebook's."""
    net = nn.Sequential(nn.Linear(8, 8))
    job = Compressor(net, Policy([Rule("*", "kmeans", bits=2)]), teacher=None, copy=False).prepare()
    (name,) = (name for name in net.state_dict() if "indices_" in name)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    state[name][3, 3] = wrong
    with pytest.raises(RuntimeError, match=f"{name} has indices from .*{wrong}.*, and there are 4 codewords"):
        job.load_state_dict({"model": state, "steps": 0})


@pytest.mark.parametrize(
    ("codewords", "dtype"),
    [(1, torch.int8), (127, torch.int8), (128, torch.int16), (32_767, torch.int16), (32_768, torch.int32)],
)
def test_indices_take_the_fewest_bytes(group: Group, codewords: int, dtype: torch.dtype) -> None:
    """The number of codewords is an index too, that of pruned weights."""
    site = group.sites[0]
    group.set_indices(site, torch.full(site.tensor.shape, -1), codewords)
    assert group.indices(site).dtype == dtype


def test_a_sequential_still_runs_and_all_traces_go(net: Any, group: Group) -> None:
    assert net(torch.randn(2, 8)).shape == (2, 4)
    detach(net)
    assert list(net.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert len(net) == 3


def test_the_unit_is_a_power_of_two_and_costs_no_digit(group: Group) -> None:
    mantissa, _ = torch.frexp(group.unit)
    assert float(mantissa) == 0.5
    group.set_codebook(torch.tensor([-1.7, 1e-30, 3.3e7]), learnt=True)
    assert torch.equal(group.codebook().detach(), torch.tensor([-1.7, 1e-30, 3.3e7]))


def test_a_taken_id_is_refused() -> None:
    taken = next(iter(SCHEMES))

    class Impostor(FreezeBySize):
        id: ClassVar[str] = taken

    with pytest.raises(UsageError, match=r"is taken by compressor\.schemes"):
        register(Impostor)
