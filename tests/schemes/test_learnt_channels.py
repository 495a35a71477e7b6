"""The learnt hash with a codebook for each channel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.compressor import Compressor
from compressor.formats.file.reader import PackedFile
from compressor.lifecycle.convert import decode_tensor
from compressor.policy.policy import Policy, Rule
from compressor.schemes.learnt import Learnt
from compressor.sharing.group import Group
from tests.helpers.groups import fitted


def hashed(group: Group) -> Tensor:
    site = group.sites[0]
    return group.scheme.weight(group, site, group.master_weight(site))


def row_by_row(weights: Tensor, codebooks: Tensor) -> Tensor:
    """The hash of each slice of axis 0 by its own codebook, by a table of all distances."""
    rows = weights.reshape(len(codebooks), -1)
    hashed_rows = [book[(row[:, None] - book).abs().argmin(1)] for row, book in zip(rows, codebooks, strict=True)]
    return torch.stack(hashed_rows).view(weights.shape)


@pytest.mark.parametrize("codewords", [1, 2, 5])
def test_each_channel_is_hashed_by_its_own_codebook(codewords: int) -> None:
    torch.manual_seed(0)
    group = fitted(Learnt(codewords, group="channel"), torch.randn(6, 30) * torch.logspace(-2, 2, 6)[:, None])
    codebooks = group.codebook().detach().view(6, codewords)
    assert torch.equal(hashed(group), row_by_row(group.master_weight(group.sites[0]).detach(), codebooks))
    gradient = torch.randn(6, 30)
    hashed(group).backward(gradient)
    assert group.values.grad is not None
    rows = group.values.grad.view(6, codewords).sum(1) * group.unit
    torch.testing.assert_close(rows, gradient.sum(1) * 6 * codewords / 180, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"sparsity": 0.6}, {"soft": 1.0}, {"init": "linear"}])
def test_codebooks_per_channel_are_stored_as_they_were_trained(settings: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, inputs = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(128, 4)).to(dtype),
        torch.randn(4, 3, 6, 6),
    )
    with torch.no_grad():
        model[0].weight[0].fill_(0.5)  # type: ignore[index]  # a channel of one value, beside others of many
    job = Compressor(model, Policy([Rule("*", scheme="learnt", bits=2, group="channel", **settings)]), teacher=None)
    job.prepare()
    opt = torch.optim.SGD(job.param_groups(lr=0.01))  # Adam's eps is zero in float16
    job.attach(opt, 20)
    for _ in range(20):
        opt.zero_grad()
        job.model(inputs.to(dtype)).float().square().mean().backward()
        opt.step()
    trained = [job.model[at].weight.detach().clone() for at in (0, 2)]  # type: ignore[index]
    packed = job.finish()
    with PackedFile.from_bytes(packed.to_bytes()) as file:
        for name, weight in zip(("0.weight", "2.weight"), trained, strict=True):
            shared = file.shared(name)
            assert shared.axis == 0
            assert torch.equal(decode_tensor(shared, file.books[shared.book]), weight)
            assert all(len(channel.unique()) <= 4 for channel in weight)
            assert len(weight.unique()) > 4


def test_small_channels_share_one_codebook() -> None:
    """Nine weights of a depthwise channel are no more than the values that would be stored for them."""
    job = Compressor(nn.Conv2d(8, 8, 3, groups=8), Policy([Rule("*", scheme="learnt", bits=4, group="channel")]))
    packed = job.prepare().finish()
    assert packed.content.sites["weight"].axis is None


def test_unused_codewords_of_a_channel_take_from_its_own_clusters() -> None:
    torch.manual_seed(0)
    scheme = Learnt(codewords=4, group="channel")
    group = fitted(scheme, torch.stack([torch.randn(200), torch.full((200,), 7.0), torch.randn(200) * 100]))
    group.values.data = torch.tensor([-1.0, 1.0, 50.0, 60.0, 7.0, 8.0, 9.0, 9.0, -90.0, -20.0, 20.0, 90.0])
    group.values.data /= group.unit
    assert [len(row.unique()) for row in hashed(group)] == [2, 1, 4]
    with torch.no_grad():
        scheme.on_step(group, 0.5)
    assert [len(row.unique()) for row in hashed(group)] == [4, 1, 4]
