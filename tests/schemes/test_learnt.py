"""The learnt hash: what the layer computes, its invariances, and that no codeword stays unused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor.compressor import Compressor
from compressor.formats.errors import PolicyError
from compressor.formats.file.reader import PackedFile
from compressor.ops.nearest import nearest
from compressor.policy.policy import Policy, Rule
from compressor.schemes.learnt import Learnt
from compressor.sharing.group import Group
from tests.helpers.groups import fitted


def from_stock_operators(weights: Tensor, codebook: Tensor) -> Tensor:
    """The hash as a convolution, a max-pooling over channels and a deconvolution, one codebook behind all three."""
    signal, codewords = weights.reshape(-1, 1, 1), len(codebook)
    logits = functional.conv1d(signal, 2 * codebook.reshape(-1, 1, 1), -codebook.square())
    channels_last = logits.transpose(1, 2)
    highest, where = functional.max_pool1d(channels_last, codewords, return_indices=True)
    one_hot = functional.max_unpool1d(torch.ones_like(highest), where, [codewords]).transpose(1, 2)
    return functional.conv_transpose1d(one_hot, codebook.reshape(-1, 1, 1)).reshape(weights.shape)


def hashed(group: Group) -> Tensor:
    site = group.sites[0]
    return group.scheme.weight(group, site, group.master_weight(site))


@pytest.mark.parametrize("codewords", [2, 3, 16])
def test_the_layer_is_convolution_pooling_and_deconvolution(codewords: int) -> None:
    torch.manual_seed(0)
    group = fitted(Learnt(codewords=codewords), torch.randn(40, 25))
    master, codebook = group.master_weight(group.sites[0]).detach(), group.codebook().detach().sort().values
    assert torch.equal(hashed(group), from_stock_operators(master, codebook))


def test_gradients_are_the_scatter_and_the_straight_through() -> None:
    torch.manual_seed(0)
    group = fitted(Learnt(codewords=4), torch.randn(40, 25))
    master = group.master_weight(group.sites[0])
    gradient = torch.randn(40, 25)
    hashed(group).backward(gradient)
    assert master.grad is not None
    assert group.values.grad is not None
    assert torch.equal(master.grad, gradient)
    codebook = group.codebook().detach()
    chosen = nearest(master.detach(), codebook)
    sums = torch.stack([gradient[chosen == k].sum() for k in range(4)])
    torch.testing.assert_close(group.values.grad * group.unit, sums * 4 / 1000, rtol=1e-4, atol=1e-5)


def test_under_gradient_descent_a_codeword_moves_as_its_weights_do() -> None:
    """With all weights in equal clusters and one gradient g everywhere, each codeword moves by lr * g."""
    group = fitted(Learnt(codewords=2), torch.tensor([[-2.0, -2.0, 2.0, 2.0]]))
    before = group.codebook().detach().clone()
    hashed(group).backward(torch.full((1, 4), 0.5))
    torch.optim.SGD(group.parameters(), lr=0.1).step()
    torch.testing.assert_close(group.codebook().detach(), before - 0.1 * 0.5)


def test_scaling_the_weights_scales_the_hash() -> None:
    torch.manual_seed(0)
    weights = torch.randn(20, 20)
    small, large = fitted(Learnt(codewords=8), weights), fitted(Learnt(codewords=8), weights * 1024)
    assert torch.equal(hashed(small) * 1024, hashed(large))


def test_codewords_that_overtake_each_other_change_nothing() -> None:
    torch.manual_seed(0)
    group = fitted(Learnt(codewords=4), torch.randn(20, 20))
    expected = hashed(group).detach().clone()
    group.values.data = group.values.data[[2, 0, 3, 1]]
    assert torch.equal(hashed(group), expected)
    shared = group.scheme.export(group)
    values = shared.books[0].expand().ravel()
    assert (values[1:] > values[:-1]).all()


def test_unused_codewords_are_put_back_to_use(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "compressor")
    torch.manual_seed(0)
    scheme = Learnt(codewords=4)
    group = fitted(scheme, torch.randn(50, 20))
    group.values.data = torch.tensor([-1.0, 1.0, 50.0, 60.0])
    assert len(hashed(group).unique()) == 2
    with torch.no_grad():
        scheme.on_step(group, 0.05)
        assert len(hashed(group).unique()) == 2, "not due before a tenth of the run"
        scheme.on_step(group, 0.1)
    assert len(hashed(group).unique()) == 4
    assert caplog.messages == ["weight: 2 of 4 codewords were unused and are put back to use"]
    group.values.data = torch.tensor([-1.0, 1.0, 50.0, 60.0])
    with torch.no_grad():
        scheme.on_step(group, 0.8)
        group.values.data = torch.tensor([-1.0, 1.0, 50.0, 60.0])
        scheme.on_step(group, 1.0)
    assert len(hashed(group).unique()) == 2, "no longer near the end"


def test_weights_and_codebook_are_learnt_together() -> None:
    """From random weights, a shared layer of four values learns a target made of four others."""
    torch.manual_seed(0)
    target = torch.tensor([-0.8, -0.2, 0.3, 0.9])[torch.randint(4, (8, 16))]
    inputs = torch.randn(512, 16)
    job = Compressor(nn.Linear(16, 8, bias=False), Policy([Rule("*", scheme="learnt", bits=2)]), teacher=None).prepare()
    opt = torch.optim.Adam(job.param_groups(lr=0.02))
    job.attach(opt, 600)
    first = None
    for _ in range(600):
        loss = functional.mse_loss(job.model(inputs), inputs @ target.T)
        first = first or loss.item()
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert first is not None
    assert loss.item() < 0.02 * first


def network_job() -> Compressor:
    """Three layers of very different spread under one codebook."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32, bias=False), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    with torch.no_grad():
        net[0].weight.mul_(30)  # type: ignore[operator]
        net[4].weight.mul_(0.01)  # type: ignore[operator]
    rule = Rule("*", scheme="learnt", bits=2, group="network")
    return Compressor(net, Policy([rule]), teacher=None).prepare()


def test_one_codebook_for_the_network_times_a_power_of_two_for_each_layer() -> None:
    job = network_job()
    assert len(job.groups) == 1
    optimizer = torch.optim.AdamW(job.param_groups(lr=0.01))
    job.attach(optimizer, 30)
    inputs, losses = torch.randn(64, 16), []
    for _ in range(30):
        loss = job.model(inputs).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = job.model(inputs)
    packed = job.finish()
    assert torch.equal(job.model(inputs), trained)
    with PackedFile.from_bytes(packed.to_bytes()) as file:
        assert len(file.books) == 1
        scales = [float(shared.scale[0]) for name in file.sites if (shared := file.shared(name)).scale is not None]
    assert len(scales) == 3
    assert all(math.log2(scale).is_integer() for scale in scales)
    assert scales[0] > 100 * scales[2]


def test_the_network_codebook_hashes_each_layer_as_if_it_stood_alone_but_for_its_scale() -> None:
    """Multiplying a layer by a power of two changes its scale and nothing else."""
    job = network_job()
    doubled = network_job().undo()
    with torch.no_grad():
        doubled[2].weight.mul_(4)  # type: ignore[index]
    again = Compressor(doubled, job.policy, teacher=None).prepare()
    assert torch.equal(job.groups[0].codebook(), again.groups[0].codebook())
    assert torch.equal(job.model[2].weight * 4, again.model[2].weight)  # type: ignore[index]


def test_a_network_that_is_assigned_softly_is_stored_as_it_was_trained() -> None:
    """The second layer has four times the weights of the first, and a last part that is shorter."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 33, bias=False))
    job = Compressor(net, Policy([Rule("*", scheme="learnt", bits=2, group="network", soft=1.0)]), teacher=None)
    optimizer = torch.optim.AdamW(job.prepare().param_groups(lr=0.05))
    job.attach(optimizer, 20)
    for _ in range(20):
        optimizer.zero_grad()
        job.model(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()
    layers = [layer for layer in job.model.modules() if isinstance(layer, nn.Linear)]
    trained = [layer.weight.detach().clone() for layer in layers]
    job.finish()
    for layer, weight in zip(layers, trained, strict=True):
        assert len(weight.unique()) == 4
        assert torch.equal(layer.weight, weight)


def test_nothing_is_reseeded_when_training_is_over() -> None:
    """Without a word on its progress, what the network computed last is what is stored."""
    torch.manual_seed(0)
    scheme = Learnt(codewords=4)
    group = fitted(scheme, torch.randn(50, 20))
    group.values.data = torch.tensor([-1.0, 1.0, 50.0, 60.0])
    before = hashed(group)
    with torch.no_grad():
        scheme.on_step(group, 1.0)
    assert torch.equal(hashed(group), before)


def test_an_unused_vector_takes_half_of_the_widest_cluster_across_its_widest_entry() -> None:
    torch.manual_seed(0)
    scheme = Learnt(codewords=3, vector=2)
    weights = torch.stack([torch.linspace(-1, 1, 200), torch.randn(200) * 0.01])  # vectors along the first entry
    group = fitted(scheme, weights)
    group.values.data = torch.tensor([0.0, 0.0, 90.0, 90.0, 5.0, 5.0]) / group.unit
    with torch.no_grad():
        scheme.on_step(group, 0.1)
        found = group.codebook().view(3, 2).detach()
        assert len(hashed(group)[0].unique()) == 3, "both of two unused codewords are in use again"
    assert found[:, 1].abs().max() < 0.01, "no cluster is split across the entry that hardly differs"
    halves = sorted(found[:, 0].tolist())
    offset = 0.8 * 3**-0.5  # of the standard deviation of an even spread from -1 to 1
    assert halves[2] == pytest.approx(offset, abs=0.01) or halves[0] == pytest.approx(-offset, abs=0.01)


def test_vectors_of_weights_move_to_other_codewords_in_training() -> None:
    torch.manual_seed(0)
    group = fitted(Learnt(codewords=4, vector=2), torch.randn(10, 20))
    before = hashed(group).detach().clone()
    master = group.master_weight(group.sites[0])
    group.values.requires_grad_(False)
    with torch.no_grad():
        master[4:6] = before[8:10]  # two channels become what two others are
    assert torch.equal(hashed(group)[4:6], before[8:10])
    assert torch.equal(hashed(group)[:4], before[:4])


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({"group_size": 2, "rate": 1e-7}, "group_size and rate"),
        ({"channel_scale": True, "rate": 1e-7}, "channel_scale and rate"),
        ({"vector": 2, "rate": 1e-7}, "vector and rate"),
        ({"vector": 2, "group": "network"}, "vector and group=network"),
        ({"channel_scale": True, "group": "network"}, "channel_scale and group=network"),
        ({"group_size": 2, "group": "network"}, "group_size and group=network"),
        ({"group_size": 2, "group": "channel"}, "group_size and group=channel"),
        ({"vector": 2, "group": "channel"}, "group=channel and vector"),
        ({"channel_scale": True, "group": "channel"}, "group=channel and channel_scale"),
        ({"vector": 2, "soft": 1.0}, "vector and soft"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], start: str) -> None:
    with pytest.raises(PolicyError, match=rf"^scheme 'learnt', {start}\b[^\n]*$"):
        Policy([Rule("*", scheme="learnt", **settings)])


def test_a_target_is_refused_before_anything_is_measured() -> None:
    policy = Policy([Rule("*", scheme="learnt", vector=2)])
    with pytest.raises(PolicyError, match=r"^scheme 'learnt', vector and rate: "):
        Compressor(nn.Linear(16, 16), policy, target_size=1000)


def test_a_codebook_for_each_channel_is_a_group_of_one() -> None:
    torch.manual_seed(0)
    weights = torch.randn(6, 30)
    assert torch.equal(
        hashed(fitted(Learnt(4, group="channel"), weights)), hashed(fitted(Learnt(4, group_size=1), weights))
    )


def test_groups_of_channels_are_assigned_softly_each_by_its_own_codebook() -> None:
    """Five channels in groups of two: the gradients of the last are those of a layer of one channel."""
    torch.manual_seed(0)
    weights, direction = torch.randn(5, 30), torch.randn(5, 30)
    group, alone = fitted(Learnt(4, group_size=2, soft=1.0), weights), fitted(Learnt(4, soft=1.0), weights[4:])
    for one, part in ((group, direction), (alone, direction[4:])):
        hashed(one).backward(part)
    gradients = [one.master_weight(one.sites[0]).grad for one in (group, alone)]
    assert gradients[0] is not None
    assert gradients[1] is not None
    torch.testing.assert_close(gradients[0][4:], gradients[1])
    assert torch.equal(hashed(group)[4:], hashed(alone))
