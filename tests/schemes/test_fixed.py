"""Fixed point: both roundings by their definitions, formats, master copies, the paper's experiment."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from compressor.compressor import Compressor
from compressor.formats.content import Grid
from compressor.formats.errors import PolicyError
from compressor.formats.file.reader import PackedFile
from compressor.policy.policy import Policy, Rule
from compressor.schemes.fixed import Fixed, round_nearest, round_stochastic
from compressor.sharing.group import Group
from compressor.sharing.registry import make_scheme
from tests.helpers.groups import fitted

ROUNDINGS = ["nearest", "stochastic"]


def group_of(weights: Tensor, **settings: Any) -> Group:
    return fitted(Fixed(**settings), weights)


def weight_of(group: Group) -> Tensor:
    return group.weight(group.sites[0], group.master_weight(group.sites[0])).detach().reshape(-1).clone()


def job_of(model: nn.Module, **settings: Any) -> Compressor:
    return Compressor(model, Policy([Rule("*", scheme="fixed", **settings)]), teacher=None).prepare()


def step(opt: torch.optim.Optimizer, loss: Callable[[], Tensor], steps: int = 1) -> None:
    for _ in range(steps):
        opt.zero_grad()
        loss().backward()
        opt.step()


def test_nearest_rounds_halves_up() -> None:
    given = [-2.5, -2.0, -1.5, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.5, 2.5]
    wanted = [-2.0, -2.0, -1.0, -1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 2.0, 3.0]
    assert round_nearest(torch.tensor(given)).tolist() == wanted


def test_nearest_is_exact_next_to_halves() -> None:
    """Where ``x + 0.5`` has no float of its own."""
    halves = torch.arange(-40, 40) + 0.5
    beside = torch.cat([torch.nextafter(halves, torch.tensor(end)) for end in (-math.inf, math.inf)])
    wanted = [float(math.floor(Fraction(x) + Fraction(1, 2))) for x in beside.tolist()]
    assert round_nearest(beside).tolist() == wanted


def test_stochastic_is_unbiased_and_takes_the_two_neighbours() -> None:
    torch.manual_seed(0)
    draws = 40_000
    for scaled in (-1.9, -0.5, 0.03125, 0.25, 7.75):
        found = round_stochastic(torch.full((draws,), scaled), torch.rand(draws))
        assert set(found.tolist()) == {math.floor(scaled), math.floor(scaled) + 1}
        share = scaled - math.floor(scaled)
        assert abs(float(found.mean()) - scaled) < 5 * math.sqrt(share * (1 - share) / draws)
    whole = torch.arange(-500, 500).float()
    assert torch.equal(round_stochastic(whole, torch.zeros(1000)), whole), "even where 0 is drawn"


@pytest.mark.parametrize(("bits", "fraction_bits"), [(2, 1), (4, 0), (8, 10), (8, -2), (16, 12)])
def test_values_are_those_of_the_format(bits: int, fraction_bits: int) -> None:
    eps, half = 2.0**-fraction_bits, 2.0 ** (bits - fraction_bits - 1)
    weights = torch.linspace(-2 * half, 2 * half, 5000)
    group = group_of(weights, bits=bits, fraction_bits=fraction_bits)
    found = weight_of(group)
    assert torch.equal(found / eps, (found / eps).round())
    assert found.min() == -half
    assert found.max() == half - eps
    assert len(found.unique()) <= 2**bits
    assert ((found - weights.clamp(-half, half - eps)).abs() <= eps / 2).all()
    assert torch.equal(weight_of(group_of(found, bits=bits, fraction_bits=fraction_bits)), found), "rounding twice"
    (book,) = group.scheme.export(group).books
    assert book == Grid(-half, eps, 2**bits)


@pytest.mark.parametrize(
    ("largest", "integer_bits"), [(0.99, 1), (1.0, 2), (-1.5, 2), (0.3, 0), (0.02, -4), (300.0, 10), (0.0, 1)]
)
def test_range_is_chosen_for_the_largest_weight(largest: float, integer_bits: int) -> None:
    group = group_of(torch.tensor([largest, largest / 2, 0.0, largest / 7]), bits=8)
    (book,) = group.scheme.export(group).books
    assert book == Grid(-(2.0 ** (integer_bits - 1)), 2.0 ** (integer_bits - 8), 256)


def test_each_tensor_has_its_own_format() -> None:
    packed = job_of(nn.Sequential(nn.Linear(16, 16), nn.Linear(100, 16)), bits=6).finish()
    assert packed.content.books == (Grid(-0.25, 2.0**-7, 64), Grid(-0.125, 2.0**-8, 64))
    with PackedFile.from_bytes(packed.to_bytes()) as file:
        assert [file.books[file.shared(name).book].step for name in file.sites] == [2.0**-7, 2.0**-8]  # type: ignore[union-attr]
    assert packed.report().to_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_largest_weights_of_a_dtype_stay_finite(dtype: torch.dtype, bits: int) -> None:
    most = torch.finfo(dtype).max
    group = group_of(torch.tensor([-most, most, most / 2, 1.0], dtype=dtype), bits=bits)
    assert torch.isfinite(weight_of(group)).all()


def moved(steps: int, **settings: Any) -> Tensor:
    """How far in units of eps weights of 0 have come by steps of eps / 4."""
    job = job_of(nn.Linear(20_000, 1, bias=False), bits=8, fraction_bits=4, **settings)
    model: Any = job.model
    job.groups[0].master_weight(job.groups[0].sites[0]).data.zero_()
    opt = torch.optim.SGD(job.param_groups(lr=1.0), lr=1.0)
    job.attach(opt, 100)
    step(opt, lambda: model.weight.sum() * -(2.0**-4) / 4, steps)
    model.eval()
    return weight_of(job.groups[0]) * 2.0**4


def test_small_steps_are_lost_to_nearest_and_count_on_average_at_random() -> None:
    assert (moved(50, rounding="nearest", master_copy=False) == 0).all()
    once = moved(1, rounding="stochastic", master_copy=False)
    assert set(once.tolist()) == {0.0, 1.0}
    assert abs(float(once.mean()) - 0.25) < 5 * math.sqrt(0.25 * 0.75 / len(once))
    often = moved(50, rounding="stochastic", master_copy=False)
    assert abs(float(often.mean()) - 50 / 4) < 5 * math.sqrt(50 * 0.25 * 0.75 / len(often))


def test_a_master_copy_gathers_small_steps() -> None:
    assert [moved(steps).unique().tolist() for steps in (1, 2, 6)] == [[0.0], [1.0], [2.0]]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_without_a_master_copy_the_weights_themselves_are_on_the_grid(rounding: str) -> None:
    job = job_of(nn.Linear(16, 12), bits=6, fraction_bits=6, rounding=rounding, master_copy=False)
    group, opt = job.groups[0], torch.optim.Adam(job.param_groups(lr=0.01))
    job.attach(opt, 9)
    for _ in range(5):
        scaled = group.master_weight(group.sites[0]).detach() * 2.0**6
        assert torch.equal(scaled, scaled.round())
        assert torch.equal(weight_of(group) * 2.0**6, scaled.reshape(-1)), "before the end, too"
        step(opt, lambda: job.model(torch.randn(8, 16)).square().mean())


def test_a_drawn_weight_is_read_alike_within_a_step_and_anew_in_the_next() -> None:
    weights = torch.randn(1000)
    group = group_of(weights, bits=3, rounding="stochastic")
    first = weight_of(group)
    assert torch.equal(weight_of(group), first)
    with torch.no_grad():
        group.on_step(0.5)
    assert not torch.equal(weight_of(group), first)
    to_nearest = weight_of(group_of(weights, bits=3))
    assert torch.equal(weight_of(group.eval()), to_nearest), "what is evaluated is what would be stored"
    with torch.no_grad():
        group.train().on_step(1.0)
    assert torch.equal(weight_of(group), to_nearest)


def test_tensors_are_drawn_apart_and_seeds_differ() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].load_state_dict(model[0].state_dict())

    def drawn(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [weight_of(group) for group in job_of(model, bits=2, rounding="stochastic").groups]

    assert not torch.equal(*drawn(0))
    assert not torch.equal(drawn(0)[0], drawn(1)[0])
    assert torch.equal(drawn(0)[0], drawn(0)[0])


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("master_copy", [True, False])
def test_resumes_in_the_middle_whatever_torch_has_drawn(rounding: str, master_copy: bool) -> None:
    inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))

    def start(seed: int) -> tuple[Compressor, torch.optim.Optimizer, Callable[[], Tensor]]:
        torch.manual_seed(seed)
        job = job_of(nn.Linear(16, 12), bits=4, rounding=rounding, master_copy=master_copy)
        opt = torch.optim.AdamW(job.param_groups(lr=0.01))
        job.attach(opt, 20)
        return job, opt, lambda: job.model(inputs).square().mean()

    whole, opt, loss = start(3)
    step(opt, loss, 9)
    states = copy.deepcopy((whole.state_dict(), opt.state_dict()))
    step(opt, loss, 11)
    resumed, opt, loss = start(4)
    resumed.load_state_dict(states[0])
    opt.load_state_dict(states[1])
    step(opt, loss, 11)
    computed = whole.model(inputs)
    for job in (whole, resumed):
        job.finish()
        assert torch.equal(job.model(inputs), computed)


def accuracy_on_digits(**settings: Any) -> float:
    """Of a small network, trained from scratch with 16 bits by plain gradient descent."""
    pixels, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    torch.manual_seed(0)
    inputs, shuffled = pixels.float() / 16, torch.randperm(len(labels))
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    job = job_of(model, bits=16, **settings)
    opt = torch.optim.SGD(job.param_groups(lr=0.05), lr=0.05)
    job.attach(opt, 400)

    def loss() -> Tensor:
        batch = shuffled[torch.randint(1300, (32,))]
        return functional.cross_entropy(job.model(inputs[batch]), labels[batch])

    step(opt, loss, 400)
    job.finish()
    return float((job.model(inputs).argmax(1) == labels)[shuffled[1300:]].float().mean())


def test_nearest_fails_where_stochastic_trains_as_in_the_paper() -> None:
    reference = accuracy_on_digits(fraction_bits=14)
    assert reference > 0.85
    for few in (8, 7):
        at_random = accuracy_on_digits(fraction_bits=few, rounding="stochastic", master_copy=False)
        assert at_random > reference - 0.05
        assert accuracy_on_digits(fraction_bits=few, rounding="nearest", master_copy=False) < reference - 0.25


def test_bits_are_the_word_length() -> None:
    assert make_scheme("fixed", {"bits": 16, "fraction_bits": 14}) == Fixed(bits=16, fraction_bits=14)
    for bits in (1, 17):
        with pytest.raises(PolicyError, match="2 to 16 bits"):
            make_scheme("fixed", {"bits": bits})


@pytest.mark.parametrize("setting", [("fraction_bits", "all"), ("fraction_bits", 500), ("rounding", "up")])
def test_impossible_settings(setting: tuple[str, Any]) -> None:
    with pytest.raises(PolicyError, match=setting[0]):
        make_scheme("fixed", dict([setting]))
