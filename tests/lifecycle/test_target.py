"""Targets and the search for a price, with files whose size is a made-up function of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from compressor.formats.errors import UsageError
from compressor.lifecycle.target import PlainSizes, Search, Target, find_rate_for_drop, find_rate_for_size
from compressor.sharing.sites import Site, find_tensors

FLOOR = 1000


def weights(count: int = 20_000) -> Site:
    """Returns a tensor with the weights of a bell curve, of a spread of 0.05."""
    layer = nn.Linear(count, 1, bias=False)
    layer.weight.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
    return find_tensors(layer)[0]


def plain_sizes() -> PlainSizes:
    site = weights()
    return PlainSizes({site: site.tensor.detach()}, {site: 1e-3})


class Files:
    """Files of made-up sizes, and the prices that they were asked for at."""

    def __init__(self, size: Callable[[float], float]) -> None:
        self.size, self.rates = size, list[float]()

    def __call__(self, rate: float) -> int:
        self.rates.append(rate)
        return round(self.size(rate))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rate": 1e-7, "size": 100}, "rate and target_size: ask for one"),
        ({"bits": 2.0, "drop": 1.0}, "target_bits and max_drop: ask for one"),
        ({"rate": 1e-7, "size": 100, "bits": 2.0}, "rate and target_size and target_bits: ask for one"),
        ({"rate": 0.0}, "rate must be a number above 0, got 0.0"),
        ({"rate": -1e-7}, "rate must be a number above 0, got -1e-07"),
        ({"rate": math.nan}, "rate must be a number above 0, got nan"),
        ({"size": 0}, "target_size must be a number above 0, got 0"),
        ({"size": True}, "target_size must be a number above 0, got True"),
        ({"size": "10 MB"}, "target_size must be a number above 0, got '10 MB'"),
        ({"bits": math.inf}, "target_bits must be a number above 0, got inf"),
        ({"bits": False}, "target_bits must be a number above 0, got False"),
        ({"drop": -1.0}, "max_drop must be a number of at least 0, got -1.0"),
        ({"rate": 1.5}, "rate must be at most 1.0, the loss of one image for a bit, got 1.5"),
    ],
)
def test_targets_that_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        Target(**given)
    assert str(error.value) == message


def test_what_a_target_asks_for() -> None:
    assert (Target().is_given, Target().is_searched, Target().bytes(1000)) == (False, False, None)
    assert (Target(rate=1e-7).is_given, Target(rate=1e-7).is_searched) == (True, False)
    assert (Target(size=500).is_searched, Target(size=500).bytes(1000)) == (True, 500)
    assert Target(bits=2.5).bytes(1001) == 312  # of 312.8 bytes
    assert (Target(drop=0).is_given, Target(drop=0).bytes(1000)) == (True, None)


def test_tensors_that_are_not_shared_are_halved_where_a_price_is_searched_for() -> None:
    assert Target(size=500).chosen(None)
    assert Target(drop=1.0).chosen(None)
    assert not Target(rate=1e-7).chosen(None)
    assert not Target().chosen(None)
    assert Target().chosen(True)
    assert not Target(size=500).chosen(False)


def test_the_plain_size_is_the_entropy_of_the_rounded_weights() -> None:
    """A step of 0.5 follows from a price of ln 2 / 12 and a curvature of 4: of 8 indices, 4, 2 and 2 are alike."""
    layer = nn.Linear(8, 1, bias=False)
    layer.weight.data = torch.tensor([[0.0, 0.1, -0.2, 0.2, 0.5, 0.6, -0.4, -0.5]])
    site = find_tensors(layer)[0]
    sizes = PlainSizes({site: site.tensor}, {site: 4.0})
    assert sizes.at(math.log(2) / 12) == pytest.approx((4 * 1 + 2 * 2 + 2 * 2) / 8)
    assert sizes.at(1.0) == 0  # a step beyond all weights
    same = PlainSizes({site: site.tensor}, None)
    assert same.at(math.log(2) / 48) == pytest.approx(1.5)


def test_expected_sizes_learn_from_passes() -> None:
    sizes = plain_sizes()
    assert sizes.expected(1e-7) / sizes.at(1e-7) == pytest.approx(sizes.expected(1e-5) / sizes.at(1e-5))
    sizes.learn(1e-7, round(2 * sizes.at(1e-7)))
    assert sizes.expected(1e-7) == pytest.approx(2 * sizes.at(1e-7), rel=1e-3)
    assert sizes.expected(1e-8) == pytest.approx(2 * sizes.at(1e-8), rel=1e-3)
    rate = sizes.rate_of(5000)
    assert sizes.expected(rate) == pytest.approx(5000, rel=0.01)
    assert rate == float(f"{rate:.4g}")


def search(target: int, size: Callable[[float], float]) -> tuple[Search, Files]:
    files = Files(size)
    found = find_rate_for_size(target, FLOOR, plain_sizes(), files)
    assert files.rates[-1] == found.rate  # the groups left behind are those of the price
    assert found.size == round(size(found.rate))
    assert len(files.rates) - found.passes in (0, 1)
    return found, files


CURVES: dict[str, Callable[[PlainSizes], Callable[[float], float]]] = {
    "as expected": lambda plain: lambda rate: FLOOR + plain.expected(rate),
    "twice as much": lambda plain: lambda rate: FLOOR + 2.5 * plain.at(rate),
    "a third of it": lambda plain: lambda rate: FLOOR + 0.4 * plain.at(rate),
    "another slope": lambda plain: lambda rate: FLOOR + 1.2 * plain.at(rate) * rate**-0.02,
    "steeper": lambda plain: lambda rate: FLOOR + plain.at(rate) ** 1.3 / 5,
}


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("target", [3000, 6000, 12_000])
def test_sizes_are_met_within_two_per_cent(curve: str, target: int) -> None:
    found, files = search(target, CURVES[curve](plain_sizes()))
    assert 0.98 * target <= found.size <= target
    assert len(files.rates) <= 5
    if curve == "as expected":
        assert len(files.rates) == 1
        assert found.predicted == pytest.approx(found.size, abs=2)


@pytest.mark.parametrize("target", [3000, 6000, 12_000])
def test_sizes_that_do_not_follow_the_prediction_are_met_roughly(target: int) -> None:
    found, _ = search(target, lambda rate: FLOOR + 4000 * math.log10(1 / rate))
    assert 0.8 * target <= found.size <= target


def test_where_predictions_creep_to_the_target_the_next_price_is_near() -> None:
    """From one side they come to none that is small enough; half way to the greatest price one is far too small."""
    plain = plain_sizes()
    found, files = search(2000, lambda rate: FLOOR + 2000 * plain.at(rate) / plain.at(1e-7) * (rate / 1e-7) ** 0.9)
    assert sum(files.size(rate) > 2000 for rate in files.rates[:5]) == 5
    assert 0.97 * 2000 <= found.size <= 2000


def test_of_sizes_in_steps_the_largest_that_fits_is_found() -> None:
    found, files = search(5000, lambda rate: 8000 if rate < 3e-8 else 4000 if rate < 1e-5 else 2000)
    assert found.size == 4000
    assert found.rate == pytest.approx(3e-8, rel=0.1)
    assert len(files.rates) <= 11


def test_where_all_fits_the_file_is_as_large_as_it_can_be() -> None:
    found, _ = search(10**9, lambda rate: FLOOR + plain_sizes().at(rate))
    assert FLOOR < found.size < 10**9
    assert found.rate < 1e-15


def test_where_only_the_floor_fits_it_is_taken() -> None:
    found, _ = search(FLOOR, lambda rate: FLOOR if rate == 1 else 5000)
    assert (found.rate, found.size) == (1.0, FLOOR)


def test_below_the_floor_there_is_nothing() -> None:
    files = Files(lambda _: FLOOR)
    message = (
        r"^a target of 999 bytes cannot be reached: with all weights zero the file takes 1,000 bytes; ask for more, or "
        r"share or halve what is untouched$"
    )
    with pytest.raises(UsageError, match=message):
        find_rate_for_size(999, FLOOR, plain_sizes(), files)
    assert files.rates == []


def search_drop(allowed: float, lost: Callable[[float], float]) -> tuple[Search, Files]:
    files = Files(lambda rate: 1000 - 50 * math.log10(rate))
    found = find_rate_for_drop(allowed, files, lambda: lost(files.rates[-1]))
    assert files.rates[-1] == found.rate
    assert found.size == round(1000 - 50 * math.log10(found.rate))
    assert found.predicted is None
    return found, files


@pytest.mark.parametrize("border", [3e-10, 1e-8, 2e-7, 5e-6])
def test_the_highest_price_that_keeps_top_1_is_found(border: float) -> None:
    found, files = search_drop(1.0, lambda rate: 0.5 if rate <= border else 3.0)
    assert border / 1.3 < found.rate <= border
    assert len(files.rates) <= 9
    assert found.passes == len(set(files.rates))


def test_a_drop_that_rises_slowly() -> None:
    found, _ = search_drop(1.0, lambda rate: max(0.0, math.log10(rate) + 8))
    assert 1e-7 / 1.3 < found.rate <= 1e-7


def test_where_nothing_is_lost_the_price_is_high() -> None:
    found, _ = search_drop(0.0, lambda _: 0.0)
    assert found.rate >= 1e-2


def test_where_too_much_is_lost_at_any_price_it_is_said() -> None:
    with pytest.raises(UsageError, match=r"^max_drop=1\.0: top-1 drops by more even at a price of \d\.\de-1\d; allow"):
        search_drop(1.0, lambda _: 5.0)


def test_a_search_needs_dense_weights() -> None:
    Target(size=1000).check(val=None, virtual=False)
    Target().check(val=None, virtual=True)
    with pytest.raises(UsageError, match="virtual=True keeps no dense weights"):
        Target(size=1000).check(val=None, virtual=True)
