"""What every scheme must do with weights, values and settings. No scheme is named here either."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.compressor import Compressor
from compressor.formats.content import decode
from compressor.formats.errors import PolicyError
from compressor.policy.policy import Policy, Rule
from compressor.policy.recipe import Recipe
from compressor.sharing.registry import SCHEMES, make_scheme, scheme_settings
from tests.helpers.contract import (
    OPTIMIZERS,
    SHARING,
    assert_it_is_what_is_computed,
    assert_weights_stay_finite,
    content_hashes_by_threads,
    job_of,
    train,
    weight_of,
)

pytestmark = pytest.mark.parametrize("scheme", SHARING)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_entries_stand_still(scheme: str, optimizer: str) -> None:
    """An entry with an index keeps it, and where the codebook is not learnt its value, whatever the optimiser does."""
    torch.manual_seed(0)
    model, inputs = nn.Linear(16, 12), torch.randn(8, 16)
    job = job_of(model, scheme).prepare()
    group = job.groups[0]
    opt = OPTIMIZERS[optimizer](job.param_groups(lr=0.05))
    job.attach(opt, 4)  # a first round may be before the first step
    kept = {name: value.clone() for name, value in group.named_buffers() if name.startswith("indices")}
    weight = weight_of(job).detach().clone()
    train(job, inputs, opt, 4)
    learnt = {name for name, _ in group.named_parameters()}
    for name, before in kept.items():
        now = dict(group.named_buffers())[name]
        assert torch.equal(now[before >= 0], before[before >= 0])
        if "values" not in learnt:
            assert torch.equal(weight_of(job)[before >= 0], weight[before >= 0])


def test_deterministic_under_a_seed(scheme: str) -> None:
    def run() -> bytes:
        torch.manual_seed(3)
        model, inputs = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(8, 16)
        job = job_of(model, scheme).prepare()
        opt = torch.optim.AdamW(job.param_groups(lr=0.01))
        job.attach(opt, 5)
        train(job, inputs, opt, 5)
        return job.finish().to_bytes()

    assert run() == run()


def test_threads_do_not_change_the_content(scheme: str) -> None:
    """Without training."""
    assert len(content_hashes_by_threads(lambda model: job_of(model, scheme))) == 1


def test_settings_survive_toml(scheme: str) -> None:
    made = SCHEMES[scheme]()
    assert make_scheme(scheme, scheme_settings(made)) == made
    recipe = Recipe.from_dict({"stage": [{"rule": [{"match": "*", "scheme": scheme}]}]})
    lines = ["[[stage]]", "[[stage.rule]]"]
    lines += [f"{key} = {toml(value)}" for key, value in recipe.to_dict()["stage"][0]["rule"][0].items()]
    assert Recipe.from_dict(tomllib.loads("\n".join(lines))) == recipe


def toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_are_kept(scheme: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Linear(24, 24).to(dtype)
    job = job_of(model, scheme).prepare()
    opt = torch.optim.SGD(job.param_groups(lr=0.0), lr=0.0)
    job.attach(opt, 1)
    opt.step()  # training is over: no weight is free any longer
    assert_it_is_what_is_computed(job, dtype)


HARD_WEIGHTS = {
    "constant": torch.full((12, 12), 0.25),
    "zero": torch.zeros(12, 12),
    "negative": -torch.rand(12, 12) - 1,
    "far from zero": 100 + torch.rand(12, 12) * 0.01,
    "wide": torch.logspace(-38, 38, 144).reshape(12, 12) * torch.tensor([1.0, -1.0]).repeat(72).reshape(12, 12),
    "tiny numbers": torch.randn(12, 12) * 1e-38,
    "two values": torch.tensor([0.5, -0.5]).repeat(72).reshape(12, 12),
}


@pytest.mark.parametrize("name", HARD_WEIGHTS)
def test_hard_weights_stay_finite(scheme: str, name: str) -> None:
    assert_weights_stay_finite(lambda model: job_of(model, scheme), HARD_WEIGHTS[name])


def test_few_distinct_values_are_kept_exactly(scheme: str) -> None:
    """Weights that are shared already lose nothing, where the scheme chooses its values and indices freely."""
    model = nn.Linear(12, 12, bias=False)
    with torch.no_grad():
        model.weight.copy_(HARD_WEIGHTS["two values"])
    job = job_of(model, scheme).prepare()
    learnt = any(parameter.requires_grad for parameter in job.groups[0].parameters())
    if learnt and job.groups[0].scheme.generator() is None:
        assert torch.equal(weight_of(job), HARD_WEIGHTS["two values"])


def test_memory_is_linear_in_the_weights(scheme: str) -> None:
    """What a step saves for the backward pass grows with the weights and not with the codewords."""

    def saved(**bits: Any) -> int:
        total = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        job = Compressor(
            nn.Linear(128, 128, bias=False), Policy([Rule("*", scheme=scheme, **bits)]), teacher=None
        ).prepare()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            job.model(torch.randn(1, 128)).sum()
        return total

    sizes = [saved()]
    for bits in (2, 6):
        try:
            sizes.append(saved(bits=bits))
        except PolicyError:  # bits this scheme cannot take
            continue
    assert max(sizes) < 3 * 128 * 128 + 1024


def test_decode_is_the_records_decoder(scheme: str) -> None:
    model = nn.Conv2d(4, 8, 3)
    packed = job_of(model, scheme).prepare().finish()
    (name, site), books = next(iter(packed.content.sites.items())), packed.content.books
    assert name == "weight"
    assert decode(site, books[site.book]).shape == (8, 4, 3, 3)
