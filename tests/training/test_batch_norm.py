"""New statistics for BatchNorm layers, and that a failure leaves the old ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from compressor.training.batch_norm import estimate_batch_norm


def broken(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(count):
        yield 9 * torch.randn(8, 4), torch.zeros(8)
    raise OSError("disk")


@pytest.mark.parametrize("count", [0, 2])
def test_batches_that_fail_leave_statistics_momentum_and_mode(count: int) -> None:
    norm = nn.BatchNorm1d(4, momentum=0.3)
    norm(torch.randn(64, 4))
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    model = nn.Sequential(norm).eval()
    with pytest.raises(OSError, match="disk"):
        estimate_batch_norm(model, broken(count))
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items())
    assert (norm.momentum, norm.training) == (0.3, False)


def test_a_loss_that_fails_leaves_the_statistics() -> None:
    norm = nn.BatchNorm1d(4)
    before = norm.state_dict()["running_var"].clone()
    losses = iter([1.0])
    with pytest.raises(StopIteration):
        estimate_batch_norm(nn.Sequential(norm), [(torch.randn(8, 4), torch.zeros(8))], loss=lambda _: next(losses))
    assert torch.equal(norm.state_dict()["running_var"], before)
