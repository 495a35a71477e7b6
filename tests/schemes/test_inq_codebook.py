"""Incremental network quantisation's codebook against the paper's equations, entry by entry."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from compressor.formats.errors import PolicyError
from compressor.schemes.inq import INQ
from compressor.sharing.group import Group
from compressor.sharing.registry import make_scheme
from compressor.sharing.sites import find_tensors
from tests.helpers.groups import fitted, weight_of


@torch.no_grad()
def quantised(weights: Tensor, bits: int = 5) -> Tensor:
    """The weights with all of them frozen."""
    group = fitted(INQ(bits=bits), weights)
    group.on_step(1.0)
    return weight_of(group)


def exponents(weights: Tensor, bits: int) -> tuple[int, int]:
    """n1 and n2 of the paper, searched for rather than computed."""
    largest = float(weights.abs().max())
    n1 = next(k for k in range(60, -60, -1) if 2.0**k <= 4 * largest / 3)
    return n1, n1 + 1 - 2 ** (bits - 1) // 2


def equation_4(weight: float, n1: int, n2: int) -> float:
    """The paper's equation 4, pair of neighbours by pair; only what is beyond the largest codeword differs."""
    values = [0.0, *(2.0**k for k in range(n2, n1 + 1))]
    for alpha, beta in pairwise(values):
        if (alpha + beta) / 2 <= abs(weight) < 3 * beta / 2:
            return math.copysign(beta, weight)
    return math.copysign(values[-1], weight) if abs(weight) >= 1.5 * values[-1] else 0.0


def hard_weights() -> Tensor:
    """A bell of weights, all borders of equation 4 and the floats on either side of them, both signs."""
    torch.manual_seed(0)
    borders = torch.tensor([part * 2.0**k for k in range(-14, 3) for part in (0.5, 0.75, 1.0, 1.5)])
    around = [torch.nextafter(borders, torch.tensor(end)) for end in (-math.inf, math.inf)]
    positive = torch.cat([borders, *around])
    return torch.cat([torch.randn(4000), torch.randn(1000) * 1e-3, positive, -positive, torch.zeros(1)])


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_weight_goes_where_equation_4_says(bits: int) -> None:
    weights = hard_weights()
    expected = [equation_4(weight, *exponents(weights, bits)) for weight in weights.tolist()]
    assert quantised(weights, bits).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", range(2, 9))
def test_values_are_zero_and_the_powers_of_two(bits: int, dtype: torch.dtype) -> None:
    weights = hard_weights().to(dtype)
    n1, n2 = exponents(weights, bits)
    values = quantised(weights, bits).float().unique()
    assert set(values.tolist()) <= {0.0, *(sign * 2.0**k for k in range(n2, n1 + 1) for sign in (-1, 1))}
    assert len(values) <= INQ(bits=bits).stored_values(len(weights)) == 2 ** (bits - 1) + 1


def test_the_papers_example_and_the_golden_one() -> None:
    """Section 2.1: b = 3 and n1 = -1 give n2 = -2; and s = 1, b = 5."""
    assert fitted(INQ(bits=3), torch.tensor([0.7, 0.1])).codebook().tolist() == [-0.5, -0.25, 0.0, 0.25, 0.5]
    codebook = fitted(INQ(bits=5), torch.tensor([1.0, -0.3])).codebook()
    assert len(codebook) == 17
    assert codebook[9:].tolist() == [2.0**k for k in range(-7, 1)]
    assert torch.equal(codebook, -codebook.flip(0))


def test_borders_are_linear() -> None:
    below = torch.nextafter(torch.tensor(1.5), torch.tensor(0.0)).item()
    found = quantised(torch.tensor([2.0, 1.5, below, 2.0**-7, 2.0**-7 * (1 - 2.0**-24)]))
    assert found.tolist() == [2.0, 2.0, 1.0, 2.0**-6, 0.0]


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_quantising_is_odd_and_done_once(bits: int) -> None:
    weights = hard_weights()
    once = quantised(weights, bits)
    assert torch.equal(quantised(once, bits), once)
    assert torch.equal(quantised(-weights, bits), -once)


def test_the_largest_weight_is_rounded_and_never_cut() -> None:
    for largest in (0.75, 1.0, 1.4999, 1.5, 3e-7, 123.0, 1.0000001):
        highest = float(fitted(INQ(), torch.tensor([largest, 0.0])).codebook()[-1])
        assert 0.75 * highest <= largest < 1.5 * highest


@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize(
    "weights",
    [
        torch.tensor([3.4e38, -1e30, 1.0]),
        torch.tensor([65504.0, 6e-8, 1e-3], dtype=torch.float16),
        torch.tensor([3e38, 1e-38], dtype=torch.bfloat16),
        torch.tensor([1e-38, -1e-40, 1e-45]),
        torch.zeros(5),
    ],
)
def test_what_the_dtype_cannot_hold_is_left_out(weights: Tensor, bits: int) -> None:
    found = quantised(weights, bits)
    assert found.dtype == weights.dtype
    assert torch.isfinite(found).all()
    if weights[0] > 1:
        assert 0.5 < float(found[0]) / float(weights[0]) < 1
    assert (fitted(INQ(bits=bits), weights).codebook().diff() > 0).all()


def test_the_largest_weight_that_is_not_pruned_sets_the_codebook() -> None:
    layer = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[8.0, 1.0, 0.5]]))
    group = Group(INQ(), find_tensors(layer))
    group.prune(group.sites[0], torch.tensor([[True, False, False]]))
    INQ().fit(group, None)
    assert float(group.codebook()[-1]) == 1.0
    group.prune(group.sites[0], torch.ones(1, 3, dtype=torch.bool))
    INQ().fit(group, None)
    assert torch.isfinite(group.codebook()).all()


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 32])
def test_bits_it_cannot_take_are_refused(bits: int) -> None:
    with pytest.raises(PolicyError, match=f"scheme 'inq' takes 2 to 8 bits, got {bits}"):
        make_scheme("inq", {"bits": bits})
