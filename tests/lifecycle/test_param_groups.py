"""The optimiser of a job: one that does not hold what the job trains is refused, and nothing else is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compressor import Compressor, Policy, Rule
from compressor.api.sparsity import UpdatePruningStep, prune_low_magnitude
from compressor.formats.errors import UsageError

LEARNT = Policy([Rule("*", scheme="learnt", bits=2)])


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))


def refused(job: Compressor, optimizer: torch.optim.Optimizer) -> str:
    with pytest.raises(UsageError) as caught:
        job.attach(optimizer, 10)
    return str(caught.value)


def test_an_optimiser_of_before_prepare_lacks_the_codebooks() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    job = Compressor(model, LEARNT, copy=False).prepare()
    assert refused(job, optimizer) == (
        "the optimiser does not hold the codebook of 0.weight, the codebook of 2.weight, which would never train: "
        "build it after prepare(), from job.param_groups(lr) or job.model.parameters()"
    )
    assert not optimizer._optimizer_step_post_hooks, "nothing is attached"


def test_an_optimiser_of_another_model_lacks_all() -> None:
    model = net()
    job = Compressor(model, LEARNT).prepare()
    said = refused(job, torch.optim.SGD(model.parameters(), lr=0.1))
    assert "the codebook of 0.weight, the master weight of 0.weight, the codebook of 2.weight and 1 more, which" in said


def test_parameters_that_were_replaced_are_not_held() -> None:
    job = Compressor(net(), LEARNT).prepare()
    optimizer = torch.optim.SGD(job.param_groups(0.1))
    job.model.load_state_dict(job.model.state_dict(), assign=True)
    assert "does not hold the codebook of 0.weight" in refused(job, optimizer)


def test_a_pruned_model_with_the_optimiser_of_the_dense_one() -> None:
    model = net()
    pruned = prune_low_magnitude(model)
    with pytest.raises(UsageError, match=r"does not hold the master weight of 0\.weight, the master weight of 2\.wei"):
        UpdatePruningStep(pruned, torch.optim.SGD(model.parameters(), lr=0.1))


def test_frozen_tensors_need_not_be_held() -> None:
    job = Compressor(net(), LEARNT).prepare()
    for frozen in (job.groups[0], job.model.get_submodule("0")):
        frozen.requires_grad_(False)
    job.attach(torch.optim.SGD([p for p in job.model.parameters() if p.requires_grad], lr=0.1), 10)
