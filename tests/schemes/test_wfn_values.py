"""The values of weight fixing: sums of few powers of two, one codebook for all layers, and zero."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from compressor.compressor import Compressor
from compressor.formats.file.reader import PackedFile
from compressor.policy.policy import Policy, Rule
from tests.helpers.wfn_jobs import job_of, network, zero_shares


def test_one_book_for_layers_of_any_scale() -> None:
    packed = job_of(network(1000.0)).finish()
    with PackedFile.from_bytes(packed.to_bytes()) as file:
        assert len(file.books) == 1
        assert [file.shared(name).book for name in file.sites] == [0, 0]
        values = file.books[0].expand().reshape(-1)
    state = packed.content.sites
    used = np.unique(np.concatenate([tensor.indices for tensor in state.values()]))
    assert len(used) == len(values)  # none is stored in vain
    assert 0 in values


def test_zero_is_stored_only_where_a_weight_is_zero() -> None:
    for weights, values in (([1.0, 0.5, 2.0, 0.5], [0.5, 1.0, 2.0]), ([1.0, 0.0, 2.0, 0.5], [0.0, 0.5, 1.0, 2.0])):
        layer = nn.Linear(4, 1, bias=False)
        layer.weight.data = torch.tensor([weights])
        packed = job_of(layer, zero_distance=0.0).finish()
        assert packed.content.books[0].expand().reshape(-1).tolist() == values
        assert layer.weight.tolist() == [weights]


def signed_digits(value: float) -> int:
    """Count the powers of two in the shortest signed sum: the non-adjacent form."""
    mantissa, _ = np.frexp(np.float32(value))
    whole, digits = int(abs(float(mantissa)) * 2**24), 0
    while whole:
        if whole & 1:
            digits += 1
            whole -= 2 - (whole & 3)
        whole >>= 1
    return digits


def test_values_are_sums_of_few_powers_of_two() -> None:
    packed = job_of(network(3.0)).finish()
    values = packed.content.books[0].expand().reshape(-1).tolist()
    assert max(signed_digits(value) for value in values) <= 5
    assert sorted(signed_digits(value) for value in values)[len(values) // 2] <= 3


def test_smaller_delta_gives_more_values_and_less_error() -> None:
    outcomes = []
    for delta in (0.04, 0.01):
        net = network()
        packed = job_of(net, delta=delta).finish()
        weights = dict(net.named_parameters())
        error = packed.content.provenance["sqnr"]
        outcomes.append((len(packed.content.books[0].expand().reshape(-1)), error))
        assert len(weights) == 4
    (few, loud), (many, quiet) = outcomes
    assert few < many
    assert all(one < two for one, two in zip(loud, quiet, strict=True))


def test_zero_is_near_in_relation_to_the_layer() -> None:
    relative, unscaled = job_of(network(1e-3)), job_of(network())
    relative.finish(), unscaled.finish()
    assert zero_shares(relative) == pytest.approx(zero_shares(unscaled), abs=0.02)
    absolute = job_of(network(1e-3), zero_distance=2**-7, zero_absolute=True)
    absolute.finish()
    assert zero_shares(absolute)[1] == 1.0


def test_zero_distance_is_the_border() -> None:
    net = network()
    dense = net[0].weight.detach().clone()
    job = job_of(net, zero_distance=0.03, zero_absolute=True)
    job.finish()
    model: Any = job.model
    assert torch.equal(model[0].weight == 0, dense.abs() < 0.03)
    job = job_of(network(), zero_distance=0.0)
    job.finish()
    assert zero_shares(job) == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_are_exact_in_the_weights_dtype(dtype: torch.dtype) -> None:
    job = job_of(network().to(dtype), delta=0.001)
    group = job.groups[0]
    group.on_step(1.0)
    assert torch.equal(group.codebook().to(dtype).float(), group.codebook())
    book: Any = job.finish().content.books[0]
    assert book.dtype == {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]


def test_mixed_dtypes_share_a_float32_book() -> None:
    net = network()
    net[2].to(torch.bfloat16)
    job = job_of(net)
    group = job.groups[0]
    group.on_step(1.0)
    computed = {site.name: group.weight(site, group.master_weight(site)).clone() for site in group.sites}
    job.finish()
    states = job.model.state_dict()
    assert all(torch.equal(states[name], weight) for name, weight in computed.items())


def test_norms_and_biases_join_by_rule() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 4))
    rules = [Rule(match, scheme="wfn") for match in ("*.bias", "1.weight", "*")]
    job = Compressor(net, Policy(rules), teacher=None).prepare()
    assert len(job.groups) == 1
    packed = job.finish()
    assert set(packed.content.sites) == {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"}
    assert len(packed.content.books) == 1
