"""Importance: the sum over batches of the squared gradient of their mean loss, by hand."""

from __future__ import annotations

import pytest
import torch
from compressor.lifecycle.importance import squared_gradients
from torch import nn

from compressor.formats.errors import UsageError
from compressor.sharing.sites import find_tensors

BATCHES = [(torch.tensor([[1.0, 2.0]]), torch.tensor([0])), (torch.tensor([[2.0, 0.0]]), torch.tensor([1]))]


def layer() -> nn.Linear:
    """Returns a layer whose two classes have probability 1/2: the loss has gradients of -1/2 and 1/2."""
    linear = nn.Linear(2, 2, bias=False)
    linear.weight.data.zero_()
    return linear


def test_gradients_are_squared_batch_by_batch() -> None:
    """Those of the first batch are [[-0.5, -1], [0.5, 1]], those of the second [[1, 0], [-1, 0]]."""
    model = layer()
    (site,) = sites = find_tensors(model)
    assert squared_gradients(model, sites, BATCHES)[site].tolist() == [[1.25, 1.0], [1.25, 1.0]]


def test_the_loss_of_a_batch_is_its_mean() -> None:
    model = layer()
    (site,) = sites = find_tensors(model)
    both = torch.cat([BATCHES[0][0], BATCHES[1][0]]), torch.tensor([0, 1])
    assert squared_gradients(model, sites, [both])[site].tolist() == [[0.0625, 0.25], [0.0625, 0.25]]


def test_the_model_is_as_before() -> None:
    model = layer().train()
    model.weight.requires_grad_(False)
    (site,) = sites = find_tensors(model)
    assert squared_gradients(model, sites, [])[site].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    squared_gradients(model, sites, BATCHES)
    assert (model.training, model.weight.requires_grad, model.weight.grad) == (True, False, None)


def test_other_batches_are_refused() -> None:
    model = layer()
    with pytest.raises(UsageError):
        squared_gradients(model, find_tensors(model), [BATCHES[0][0]])  # type: ignore[list-item]
