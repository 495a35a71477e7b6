"""What every scheme must do, from the first day. No scheme is named here: the registry drives the tests."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional

from compressor.core import Compressor
from compressor.formats.errors import PolicyError
from compressor.formats.packed import pack
from compressor.formats.reader import PackedFile
from compressor.formats.record import decode
from compressor.packing import decoded
from compressor.policy import Policy, Rule
from compressor.recipe import Recipe
from compressor.scheme import SCHEMES, make_scheme, scheme_settings

SHARING = sorted(name for name, scheme in SCHEMES.items() if scheme.shares)
pytestmark = pytest.mark.parametrize("scheme", SHARING)


class WeightStandardised(nn.Conv2d):
    """A convolution that reads its weight twice, as timm's weight-standardised ones do."""

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean()) / self.weight.std()
        return functional.conv2d(x, weight, self.bias) + self.weight.mean()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return output


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.head(self.embed(tokens))
        return output


MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(16, 12), lambda: torch.randn(4, 16)),
    "tiny": (lambda: nn.Linear(5, 1), lambda: torch.randn(4, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 8, 3), lambda: torch.randn(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 8, 3), lambda: torch.randn(2, 4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3), lambda: torch.randn(2, 2, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 8, 3), lambda: torch.randn(2, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), lambda: torch.randn(2, 8, 5, 5)),
    "embedding": (lambda: nn.Embedding(20, 8), lambda: torch.randint(20, (3, 5))),
    "attention": (Attention, lambda: torch.randn(2, 5, 16)),
    "standardised": (lambda: WeightStandardised(4, 8, 3), lambda: torch.randn(2, 4, 6, 6)),
    "tied": (Tied, lambda: torch.randint(20, (3, 5))),
}


def weight_of(job: Compressor) -> Tensor:
    model: Any = job.model
    found: Tensor = model.weight
    return found


def rule_of(scheme: str, match: str = "*") -> Rule:
    """Two bits where the scheme takes bits, else its defaults."""
    try:
        SCHEMES[scheme].settings_for_bits(2)
    except PolicyError:
        return Rule(match, scheme=scheme)
    return Rule(match, scheme=scheme, bits=2)


def job_of(model: nn.Module, scheme: str, **options: Any) -> Compressor:
    return Compressor(model, Policy([rule_of(scheme)]), teacher=None, **options)


def train(job: Compressor, inputs: Tensor, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (job.model(inputs).square().mean() + job.penalty()).backward()
        optimizer.step()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_trains_and_packs_exactly_what_it_computed(scheme: str, kind: str, optimizer: str) -> None:
    make, inputs_of = MODULES[kind]
    torch.manual_seed(0)
    model, inputs = make(), inputs_of()
    job = job_of(model, scheme).prepare()
    opt = OPTIMIZERS[optimizer](job.param_groups(lr=0.05))
    job.attach(opt, 3)
    train(job, inputs, opt)
    job.model.eval()
    trained = job.model(inputs)
    packed = job.finish()
    assert torch.equal(job.model(inputs), trained)
    with PackedFile.from_bytes(pack(packed.content)) as file:
        for name in file.sites:
            shared = file.shared(name)
            weights = job.model.state_dict()[name]
            assert torch.equal(decoded(shared, file.books[shared.book]), weights)
            codewords = file.books[shared.book].expand()
            if shared.scale is None and shared.offset is None:
                assert np.isin(weights.numpy(), codewords).all()


@pytest.mark.parametrize("kind", MODULES)
def test_finish_leaves_no_trace(scheme: str, kind: str) -> None:
    model = MODULES[kind][0]()
    before = {n: (type(m), list(m._parameters), dict(m.__dict__).keys()) for n, m in model.named_modules()}
    keys, parameters = list(model.state_dict()), dict(model.named_parameters(remove_duplicate=False))
    job_of(model, scheme, copy=False).prepare().finish()
    assert list(model.state_dict()) == keys
    assert {n: (type(m), list(m._parameters), dict(m.__dict__).keys()) for n, m in model.named_modules()} == before
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert parameter is parameters[name]


@pytest.mark.parametrize("kind", MODULES)
def test_undo_restores(scheme: str, kind: str) -> None:
    make, inputs_of = MODULES[kind]
    model = make()
    dense = copy.deepcopy(model.state_dict())
    job = job_of(model, scheme, copy=False).prepare()
    train(job, inputs_of(), torch.optim.SGD(job.param_groups(lr=0.0), lr=0.0))
    job.undo()
    assert list(model.state_dict()) == list(dense)
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())


def test_the_given_model_is_not_touched(scheme: str) -> None:
    model = nn.Linear(8, 8)
    dense = copy.deepcopy(model.state_dict())
    job_of(model, scheme).prepare().finish()
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())


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
    """Without training, and with more weights than torch gives to one thread."""
    before = torch.get_num_threads()
    torch.manual_seed(3)
    model, hashes = nn.Linear(300, 300), set()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with PackedFile.from_bytes(job_of(model, scheme).prepare().finish().to_bytes()) as file:
                hashes.add(file.content_sha256())
    finally:
        torch.set_num_threads(before)
    assert len(hashes) == 1


def test_resumed_training_ends_in_the_same_bytes(scheme: str) -> None:
    def start() -> tuple[Compressor, torch.optim.Optimizer, Tensor]:
        torch.manual_seed(3)
        model, inputs = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(8, 16)
        job = job_of(model, scheme).prepare()
        opt = torch.optim.AdamW(job.param_groups(lr=0.01))
        job.attach(opt, 20)
        return job, opt, inputs

    whole, opt, inputs = start()
    train(whole, inputs, opt, 9)
    job_state, opt_state = copy.deepcopy(whole.state_dict()), copy.deepcopy(opt.state_dict())
    train(whole, inputs, opt, 11)
    resumed, opt, inputs = start()
    resumed.load_state_dict(job_state)
    opt.load_state_dict(opt_state)
    train(resumed, inputs, opt, 11)
    assert resumed.finish().to_bytes() == whole.finish().to_bytes()


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
    computed = weight_of(job).detach().clone()
    packed = job.finish()
    assert computed.dtype == dtype
    assert torch.equal(weight_of(job), computed)
    with PackedFile.from_bytes(packed.to_bytes()) as file:
        shared = file.shared("weight")
        assert torch.equal(decoded(shared, file.books[shared.book]), computed)


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
    model = nn.Linear(12, 12, bias=False)
    with torch.no_grad():
        model.weight.copy_(HARD_WEIGHTS[name])
    job = job_of(model, scheme).prepare()
    opt = torch.optim.AdamW(job.param_groups(lr=1e-3))
    job.attach(opt, 2)
    train(job, torch.randn(4, 12) * 1e-3, opt, 2)
    packed = job.finish()
    assert torch.isfinite(weight_of(job)).all()
    assert len(packed.to_bytes()) > 0


def test_few_distinct_values_are_kept_exactly(scheme: str) -> None:
    """Weights that are shared already lose nothing, where the scheme chooses its values and indices freely."""
    model = nn.Linear(12, 12, bias=False)
    with torch.no_grad():
        model.weight.copy_(HARD_WEIGHTS["two values"])
    job = job_of(model, scheme).prepare()
    learnt = any(parameter.requires_grad for parameter in job.groups[0].parameters())
    if learnt and job.groups[0].scheme.generator() is None:
        assert torch.equal(weight_of(job), HARD_WEIGHTS["two values"])


def test_tied_tensors_stay_tied_and_are_stored_once(scheme: str) -> None:
    model = Tied()
    job = job_of(model, scheme, copy=False).prepare()
    packed = job.finish()
    assert model.head.weight is model.embed.weight
    assert list(packed.content.sites) == ["embed.weight"]
    assert packed.content.aliases == {"head.weight": "embed.weight"}


def test_deep_copies_stand_alone(scheme: str) -> None:
    """As timm's exponential moving average copies a model in training."""
    torch.manual_seed(0)
    model, inputs = nn.Linear(16, 12), torch.randn(8, 16)
    job = job_of(model, scheme).prepare()
    before = job.model(inputs).detach()
    copied = copy.deepcopy(job.model)
    opt = torch.optim.SGD(job.param_groups(lr=0.5), lr=0.5)
    train(job, inputs, opt, 3)
    assert torch.equal(copied(inputs), before)
    assert not torch.equal(job.model(inputs), before)
    job.finish()
    assert torch.equal(copied(inputs), before)


def test_averages_with_timms_ema(scheme: str) -> None:
    model = nn.Linear(16, 12)
    job = job_of(model, scheme).prepare()
    ema = ModelEmaV3(job.model, decay=0.5)
    opt = torch.optim.SGD(job.param_groups(lr=0.1), lr=0.1)
    train(job, torch.randn(8, 16), opt, 2)
    ema.update(job.model)
    assert torch.isfinite(ema.module(torch.randn(2, 16))).all()


@pytest.mark.parametrize("other", SHARING)
def test_two_schemes_in_one_model_under_one_optimiser(scheme: str, other: str) -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(8, 16)
    policy = Policy([rule_of(scheme, "0"), rule_of(other, "2")])
    job = Compressor(model, policy, teacher=None).prepare()
    opt = torch.optim.AdamW(job.param_groups(lr=0.01))
    job.attach(opt, 3)
    train(job, inputs, opt, 3)
    computed = job.model(inputs)
    packed = job.finish()
    assert torch.equal(job.model(inputs), computed)
    assert set(packed.content.sites) == {"0.weight", "2.weight"}


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
