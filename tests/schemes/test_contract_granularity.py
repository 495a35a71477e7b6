"""What every scheme must do that has group_size, channel_scale or vector. The registry says which have."""

from __future__ import annotations

import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compressor
from compressor.compressor import Compressor
from compressor.formats.errors import PolicyError
from compressor.formats.file.reader import PackedFile
from compressor.lifecycle.convert import decode_tensor
from compressor.policy.policy import Policy, Rule
from compressor.policy.recipe import Recipe
from compressor.sharing.registry import SCHEMES
from tests.helpers.contract import (
    MODULES,
    assert_it_is_what_is_computed,
    assert_weights_stay_finite,
    content_hashes_by_threads,
    train,
    weight_of,
)

VALUES: dict[str, list[Any]] = {"group_size": [1, 3], "channel_scale": [True], "vector": [2, 3]}
CASES = [
    (scheme, {setting: value})
    for scheme in sorted(SCHEMES)
    for setting, values in VALUES.items()
    for value in values
    if setting in {one.name for one in fields(SCHEMES[scheme])}  # type: ignore[arg-type]
]
CASES += [(scheme, {**settings, "channel_scale": True}) for scheme, settings in CASES if settings.get("vector") == 2]
VECTORS = [(scheme, settings) for scheme, settings in CASES if "vector" in settings]
BY_CASE = pytest.mark.parametrize(("scheme", "settings"), CASES, ids=str)
BY_VECTOR = pytest.mark.parametrize(("scheme", "settings"), VECTORS, ids=str)


def job_of(model: nn.Module, scheme: str, settings: dict[str, Any], **options: Any) -> Compressor:
    return Compressor(model, Policy([Rule("*", scheme=scheme, codewords=4, **settings)]), teacher=None, **options)


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(2, 10, 3), nn.ReLU(), nn.Flatten(), nn.Linear(160, 7))


def images(count: int = 8) -> Tensor:
    return torch.randn(count, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def test_some_schemes_have_them() -> None:
    assert {setting for _, settings in CASES for setting in settings} == set(VALUES)


@BY_CASE
@pytest.mark.parametrize("kind", [kind for kind in MODULES if kind != "tiny"])
def test_trains_and_packs_exactly_what_it_computed(
    scheme: str, settings: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    make, inputs_of = MODULES[kind]
    torch.manual_seed(0)
    model, inputs = make(), inputs_of()
    job = job_of(model, scheme, settings).prepare()
    opt = torch.optim.AdamW(job.param_groups(lr=0.05))
    job.attach(opt, 12)
    train(job, inputs, opt, 12)
    job.model.eval()
    trained = job.model(inputs)
    packed = job.finish()
    packed.save(tmp_path / "packed.safetensors")
    assert torch.equal(job.model(inputs), trained)
    for weights in ("dense", "packed"):
        loaded = compressor.load(tmp_path / "packed.safetensors", model=make(), weights=weights).eval()
        torch.testing.assert_close(loaded(inputs), trained, rtol=1e-5, atol=1e-6)
    with PackedFile.from_bytes(packed.to_bytes()) as file:
        for name in file.sites:
            shared = file.shared(name)
            assert torch.equal(decode_tensor(shared, file.books[shared.book]), job.model.state_dict()[name])


@BY_CASE
def test_the_file_has_the_groups_factors_and_vectors_asked_for(scheme: str, settings: dict[str, Any]) -> None:
    content = job_of(network(), scheme, settings).prepare().finish().content
    for name, channels in (("0.weight", 10), ("3.weight", 7)):
        site = content.sites[name]
        books, _, length = content.books[site.book].shape
        assert length == settings.get("vector", 1)
        assert books == (-(-channels // settings["group_size"]) if "group_size" in settings else 1)
        assert (None if site.scale is None else len(site.scale)) == (channels if "channel_scale" in settings else None)
        assert len(site.indices) == -(-channels // length) * (18 if channels == 10 else 160)


@BY_CASE
def test_resumed_training_ends_in_the_same_bytes(scheme: str, settings: dict[str, Any]) -> None:
    def start() -> tuple[Compressor, torch.optim.Optimizer]:
        job = job_of(network(), scheme, settings).prepare()
        opt = torch.optim.AdamW(job.param_groups(lr=0.01))
        job.attach(opt, 12)
        return job, opt

    whole, opt = start()
    train(whole, images(), opt, 5)
    job_state, opt_state = copy.deepcopy(whole.state_dict()), copy.deepcopy(opt.state_dict())
    train(whole, images(), opt, 7)
    resumed, opt = start()
    with torch.no_grad():
        for buffer in resumed.groups[0].buffers():
            buffer.zero_()  # what is not in the state would be missed
    resumed.load_state_dict(job_state)
    opt.load_state_dict(opt_state)
    train(resumed, images(), opt, 7)
    assert resumed.finish().to_bytes() == whole.finish().to_bytes()


@BY_CASE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prepared_first", [False, True])
def test_dtypes_are_kept(scheme: str, settings: dict[str, Any], dtype: torch.dtype, prepared_first: bool) -> None:
    torch.manual_seed(0)
    model = nn.Linear(24, 24)
    job = job_of(model if prepared_first else model.to(dtype), scheme, settings).prepare()
    if prepared_first:
        job.model.to(dtype)
    assert_it_is_what_is_computed(job, dtype)


HARD_WEIGHTS = {
    "zero": torch.zeros(12, 12),
    "zero channels": torch.randn(12, 12).clamp(min=0) * (torch.arange(12) % 3 == 0)[:, None],
    "far from zero": 100 + torch.rand(12, 12) * 0.01,
    "wide": torch.logspace(-15, 15, 144).reshape(12, 12) * torch.tensor([1.0, -1.0]).repeat(72).reshape(12, 12),
    "tiny numbers": torch.randn(12, 12) * 1e-38,
}


@BY_CASE
@pytest.mark.parametrize("name", HARD_WEIGHTS)
def test_hard_weights_stay_finite(scheme: str, settings: dict[str, Any], name: str) -> None:
    assert_weights_stay_finite(lambda model: job_of(model, scheme, settings), HARD_WEIGHTS[name])


@BY_CASE
def test_few_distinct_channels_are_kept_exactly(scheme: str, settings: dict[str, Any]) -> None:
    """Any two neighbours are one of two pairs, any three one of four triples."""
    model = nn.Linear(12, 12, bias=False)
    weights = torch.tensor([0.5, -0.5]).repeat(6)[:, None] * torch.tensor([1.0, -1.0]).repeat(6)
    with torch.no_grad():
        model.weight.copy_(weights)
    assert torch.equal(weight_of(job_of(model, scheme, settings).prepare()), weights)


@BY_CASE
def test_threads_do_not_change_the_content(scheme: str, settings: dict[str, Any]) -> None:
    assert len(content_hashes_by_threads(lambda model: job_of(model, scheme, settings))) == 1


@BY_CASE
def test_memory_is_linear_in_the_weights(scheme: str, settings: dict[str, Any]) -> None:
    """A step saves an index for each weight, and what it multiplies by."""
    total = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel()
        return tensor

    rule = Rule("*", scheme=scheme, **{"codewords": 64, **settings})
    job = Compressor(nn.Linear(128, 128, bias=False), Policy([rule]), teacher=None).prepare()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        job.model(torch.randn(1, 128)).sum()
    assert total < 4 * 128 * 128 + 128 * 64


@BY_CASE
def test_gradients_reach_each_codeword_as_the_sum_over_its_weights(scheme: str, settings: dict[str, Any]) -> None:
    """By finite differences: the loss is linear in the codebook while no weight changes its codeword."""
    torch.manual_seed(0)
    job = job_of(nn.Linear(12, 12, bias=False), scheme, settings).prepare()
    group, direction = job.groups[0], torch.randn(12, 12)
    (weight_of(job) * direction).sum().backward()
    assert group.values.grad is not None
    factor = float(len(group.values) / (144 * group.unit**2))
    gradient, step = group.values.grad / factor, 1e-4
    for at in range(len(group.values)):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                group.values[at] += sign * step
                ends.append(float((weight_of(job).double() * direction).sum()))
                group.values[at] -= sign * step
        assert float(gradient[at]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=0.02, abs=0.02)


@BY_CASE
@pytest.mark.parametrize("settings_of_last", [{}, {"vector": 2}])
def test_settings_survive_a_recipe(scheme: str, settings: dict[str, Any], settings_of_last: dict[str, Any]) -> None:
    rules = [
        {"match": "a", "scheme": scheme, **settings},
        {"match": "*", "scheme": scheme, **settings_of_last},
    ]
    recipe = Recipe.from_dict({"stage": [{"rule": rules}]})
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert all(recipe.to_dict()["stage"][0]["rule"][0][name] == value for name, value in settings.items())


REFUSED: dict[str, dict[str, Any]] = {
    "group_size and channel_scale": {"group_size": 2, "channel_scale": True},
    "group_size and vector": {"group_size": 2, "vector": 2},
    "vector and init=linear": {"vector": 2, "init": "linear"},
    "vector and codewords=16385": {"vector": 2, "codewords": 16_385},
}


@pytest.mark.parametrize("start", REFUSED)
@pytest.mark.parametrize("scheme", sorted({scheme for scheme, _ in VECTORS}))
def test_settings_that_contradict_each_other_are_refused_in_one_line(scheme: str, start: str) -> None:
    with pytest.raises(PolicyError) as error:
        Policy([Rule("*", scheme=scheme, **REFUSED[start])])
    assert str(error.value).startswith(f"scheme {scheme!r}, {start}: ")
    assert "\n" not in str(error.value)


@BY_VECTOR
def test_vectors_are_not_pruned(scheme: str, settings: dict[str, Any]) -> None:
    """Whatever asks for zeros, before anything is trained or measured."""
    sparse, padded = nn.Linear(12, 12), nn.Embedding(20, 8, padding_idx=0)
    with torch.no_grad():
        sparse.weight[0, 0] = 0.0
    given = rf".*vector={settings['vector']}.* cannot fix single weights to zero: [^\n]*$"
    with pytest.raises(PolicyError, match=rf"^rule '\*' has sparsity, and {given}"):
        Policy([Rule("*", scheme=scheme, sparsity=0.5, **settings)])
    with pytest.raises(PolicyError, match=f"^weight has pruned weights, and {given}"):
        job_of(sparse, scheme, settings, preserve_sparsity=True)
    with pytest.raises(PolicyError, match=f"^weight has a row of padding, and {given}"):
        job_of(padded, scheme, settings)
    job_of(sparse, scheme, settings)
    job_of(nn.Linear(12, 12), scheme, settings, preserve_sparsity=True)  # there is no zero to preserve


@BY_CASE
def test_pruned_weights_stay_zero_where_codewords_are_single_weights(scheme: str, settings: dict[str, Any]) -> None:
    if "vector" in settings:
        return
    torch.manual_seed(0)
    job = job_of(nn.Linear(24, 24), scheme, {**settings, "sparsity": 0.5}).prepare()
    opt = torch.optim.AdamW(job.param_groups(lr=0.05))
    job.attach(opt, 3)
    train(job, torch.randn(4, 24), opt, 3)
    computed = weight_of(job).detach().clone()
    assert int((computed == 0).sum()) == 288
    with PackedFile.from_bytes(job.finish().to_bytes()) as file:
        shared = file.shared("weight")
        assert torch.equal(decode_tensor(shared, file.books[shared.book]), computed)
