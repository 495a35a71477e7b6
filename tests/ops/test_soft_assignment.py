"""The soft hash: its closed-form gradients, its invariances, and the hard hash as its limit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from compressor.compressor import Compressor
from compressor.ops.nearest import nearest
from compressor.ops.soft_assignment import soft_assignment, soft_gradient
from compressor.policy.policy import Policy, Rule


def from_autograd(master: Tensor, codebook: Tensor, temperature: float) -> Tensor:
    """The same from stock operators, with the whole N x K matrix: logits, softmax, deconvolution."""
    signal = master.reshape(-1, 1, 1)
    logits = nn.functional.conv1d(
        signal, 2 * codebook.reshape(-1, 1, 1) / temperature, -codebook.square() / temperature
    )
    shares = logits.softmax(1)
    return nn.functional.conv_transpose1d(shares, codebook.reshape(-1, 1, 1)).reshape(master.shape)


def drawn(count: int, codewords: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(count)
    master = torch.randn(count, dtype=torch.float64, requires_grad=True)
    codebook = torch.randn(codewords, dtype=torch.float64).sort().values.requires_grad_()
    return master, codebook


def slopes(master: Tensor, codebook: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """dw~/dw, [N], and dw~/dc, [N, K]."""
    to_latent, to_codebook = torch.autograd.functional.jacobian(
        lambda w, c: soft_assignment(w, c, temperature), (master, codebook)
    )
    return to_latent.diagonal(), to_codebook


@pytest.mark.parametrize("entries", [1, 5 * 7, 1000])
def test_gradients_in_blocks_of_any_size(entries: int) -> None:
    master, codebook = drawn(23, 5)
    assert torch.autograd.gradcheck(lambda w, c: soft_assignment(w, c, 0.3, entries), (master, codebook))


def test_value_and_gradients_are_those_of_stock_operators() -> None:
    master, codebook = drawn(40, 6)
    gradient = torch.randn(40, dtype=torch.float64)
    mine, stock = soft_assignment(master, codebook, 0.2), from_autograd(master, codebook, 0.2)
    torch.testing.assert_close(mine, stock, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(mine, (master, codebook), gradient)
    theirs = torch.autograd.grad(stock, (master, codebook), gradient)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_soft_becomes_hard() -> None:
    """Away from the midpoints; at a midpoint it stays in the middle whatever the temperature."""
    codebook = torch.tensor([-1.0, -0.2, 0.3, 1.5])
    master = torch.linspace(-2, 2, 4001)
    bounds = (codebook[1:] + codebook[:-1]) / 2
    away = ((master[:, None] - bounds).abs() > 0.01).all(1)
    hard = codebook[nearest(master, codebook)]
    gaps = [float((soft_assignment(master, codebook, t) - hard)[away].abs().max()) for t in (0.1, 0.01, 0.001)]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-3
    torch.testing.assert_close(soft_assignment(bounds, codebook, 0.001), bounds, rtol=0, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
def test_slopes_are_the_variance_and_sum_to_one(temperature: float) -> None:
    """dw~/dw = 2 Var(c) / tau; moving weights and codewords together moves the hash along."""
    master, codebook = drawn(30, 5)
    to_latent, to_codebook = slopes(master, codebook, temperature)
    shares = torch.softmax(-(master[:, None] - codebook).square() / temperature, 1).detach()
    mean = shares @ codebook.detach()
    variance = shares @ codebook.detach().square() - mean.square()
    torch.testing.assert_close(to_latent, 2 * variance / temperature, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(to_codebook.sum(1), 1 - to_latent, rtol=1e-8, atol=1e-12)


def test_scaling_weights_codewords_and_temperature_scales_the_hash() -> None:
    master, codebook = drawn(30, 5)
    torch.testing.assert_close(
        soft_assignment(master * 4, codebook * 4, 0.1 * 16), soft_assignment(master, codebook, 0.1) * 4
    )


def test_order_of_the_codewords_does_not_matter() -> None:
    master, codebook = drawn(30, 5)
    torch.testing.assert_close(soft_assignment(master, codebook.flip(0), 0.1), soft_assignment(master, codebook, 0.1))


def test_hard_value_with_soft_gradients() -> None:
    master, codebook = drawn(30, 5)
    gradient = torch.randn(30, dtype=torch.float64)
    indices = nearest(master.detach().float(), codebook.detach().float())
    hard = soft_gradient(master, codebook, indices, 0.2)
    assert torch.equal(hard, codebook[indices.long()])
    ours = torch.autograd.grad(hard, (master, codebook), gradient)
    soft = torch.autograd.grad(soft_assignment(master, codebook, 0.2), (master, codebook), gradient)
    assert all(torch.equal(one, other) for one, other in zip(ours, soft, strict=True))


def test_a_step_saves_weights_and_codewords_only() -> None:
    saved = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.numel()
        return tensor

    master, codebook = drawn(5000, 64)
    with saved_tensors_hooks(count, lambda tensor: tensor):
        soft_gradient(master, codebook, torch.zeros(5000, dtype=torch.int32), 0.1)
    assert saved == 5000 + 64


@pytest.mark.parametrize("soft", [0.0, 1.0])
def test_training_cools_the_hash(soft: float) -> None:
    """A shared layer learns a target of two values either way; the temperature ends at a hundredth."""
    torch.manual_seed(0)
    target = torch.tensor([-0.5, 0.9])[torch.randint(2, (8, 16))]
    inputs = torch.randn(256, 16)
    rule = Rule("*", scheme="learnt", bits=1, soft=soft)
    job = Compressor(nn.Linear(16, 8, bias=False), Policy([rule]), teacher=None).prepare()
    optimiser = torch.optim.Adam(job.param_groups(lr=0.02))
    job.attach(optimiser, 300)
    losses = []
    for _ in range(300):
        loss = (job.model(inputs) - inputs @ target.T).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert job.groups[0].state_dict()["temperature"].item() == pytest.approx(soft * 0.01)
