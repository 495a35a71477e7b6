"""The scheme that shares nothing: the network computes with the trained weights, and the file holds them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from compressor.compressor import Compressor
from compressor.formats.errors import PolicyError
from compressor.formats.file.reader import PackedFile
from compressor.policy.policy import Policy, Rule

WEIGHTS = [0.25, -0.5, 1.0, -2.0]


def job_of(**settings: Any) -> tuple[Compressor, nn.Linear]:
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([WEIGHTS])
    job = Compressor(layer, Policy([Rule("*", scheme="dense", **settings)]), teacher=None).prepare()
    model = job.model
    assert isinstance(model, nn.Linear)
    return job, model


@pytest.mark.parametrize(
    ("settings", "weights"), [({}, WEIGHTS), ({"sparsity": 0.5}, [0.0, 0.0, 1.0, -2.0])], ids=["dense", "pruned"]
)
def test_the_network_computes_with_the_weights_themselves(settings: dict[str, Any], weights: list[float]) -> None:
    job, model = job_of(**settings)
    assert model.weight.tolist() == [weights]
    assert model(torch.eye(4)).reshape(-1).tolist() == weights
    packed = job.finish()
    assert model.weight.tolist() == [weights]
    with PackedFile.from_bytes(packed.to_bytes()) as file:
        assert (list(file.sites), list(file.raw_names)) == ([], ["weight"])
        assert torch.frombuffer(bytearray(file.raw("weight").data), dtype=torch.float32).tolist() == weights


def test_gradients_are_those_of_the_weights() -> None:
    job, model = job_of()
    optimizer = torch.optim.SGD(job.param_groups(lr=0.5), lr=0.5)
    job.attach(optimizer, 1)
    model(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).sum().backward()
    optimizer.step()
    job.finish()
    assert model.weight.tolist() == [[-0.25, -1.5, -0.5, -4.0]]


def test_there_are_no_bits() -> None:
    with pytest.raises(PolicyError, match="scheme 'dense' shares no values and takes no bits, got 4"):
        job_of(bits=4)
