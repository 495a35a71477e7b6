"""Targets: the price of a bit at which the file has the size, or the model the accuracy, that was asked for."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

from torch import Tensor

from compressor.calibration.price import entropy, grid_step
from compressor.formats.errors import UsageError
from compressor.sharing.sites import Site

__all__ = ["FileOptions", "PlainSizes", "Search", "Target", "find_rate_for_drop", "find_rate_for_size"]

_log = logging.getLogger(__name__)

NEAR = 0.985  # of the target: a file that is larger, and no larger than the target, ends the search; 0.98 is promised
AIM = 0.993  # of the target: what the search tries to reach
CLOSE = 1.001  # the ratio of two prices between which there is no other worth a pass
MOST_PASSES = 10  # in which all weights are rounded
FIRST_RATIO = 1.2  # of the bytes of indices with and without error feedback, as it mostly is
FAR, MOST_SLOPE = 3.0, 0.3  # bounds of how the logarithm of that ratio is extrapolated to that of another price
LEAST_RATE, MOST_RATE = 1e-16, 1.0
DROP_PASSES = 8
PREDICTED_PASSES = 5  # of MOST_PASSES at a predicted price; predictions may creep, so then the rest is halved
BEYOND = 1.05  # times, from a price that none was tried beyond to the next, where predictions crept
NEARLY = 1.1  # times the target, of a file that predictions have crept to
WIDEST_DROP_STEP = 8.0  # times, from one price to the next until the drop is between two


@dataclass(frozen=True)
class Target:
    """What is asked for; at most one is not None.

    Args:
        rate: the price of a bit of the file, in the loss of one image.
        size: bytes of the file, at most.
        bits: bits of the file for each shared weight, at most.
        drop: points of top-1 accuracy that may be lost on the validation batches.
    """

    rate: float | None = None
    size: int | None = None
    bits: float | None = None
    drop: float | None = None

    def __post_init__(self) -> None:
        """Checks that it can be searched for.

        Raises:
            UsageError: several are given, or one that is not a number above zero.
        """
        names = {"rate": self.rate, "target_size": self.size, "target_bits": self.bits, "max_drop": self.drop}
        given: dict[str, Any] = {name: value for name, value in names.items() if value is not None}
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)}: ask for one")
        for name, value in given.items():
            least, bound = (0.0, "of at least 0") if name == "max_drop" else (math.ulp(0.0), "above 0")
            if isinstance(value, bool) or not isinstance(value, Real) or not least <= float(value) < math.inf:
                raise UsageError(f"{name} must be a number {bound}, got {value!r}")
        if self.rate is not None and self.rate > MOST_RATE:
            raise UsageError(f"rate must be at most {MOST_RATE}, the loss of one image for a bit, got {self.rate!r}")

    @property
    def is_given(self) -> bool:
        """Whether anything is asked for."""
        return any(value is not None for value in (self.rate, self.size, self.bits, self.drop))

    @property
    def is_searched(self) -> bool:
        """Whether the price has to be searched for."""
        return self.is_given and self.rate is None

    def check(self, val: object, virtual: bool) -> None:
        """Checks that there is what a search needs: batches to measure accuracy on, and dense weights to start from.

        Raises:
            UsageError: there is not.
        """
        if self.is_given and virtual:
            raise UsageError(
                "virtual=True keeps no dense weights, which each pass of a search starts from: leave it out"
            )
        if self.drop is not None and val is None:
            raise UsageError("max_drop is measured on validation batches: prepare(val=...)")
        if self.drop is not None and isinstance(val, Iterator):
            raise UsageError("val: batches that can be gone through only once; give a list or a DataLoader")

    def chosen(self, option: bool | None) -> bool:
        """Returns whether something is done that makes files smaller; None: where a price is searched for."""
        return self.is_searched if option is None else option

    def bytes(self, weights: int) -> int | None:
        """Returns how large the file may be, None where that is not what is asked for.

        Args:
            weights: how many are shared.
        """
        return math.floor(self.bits * weights / 8) if self.bits is not None else self.size


@dataclass(frozen=True)
class FileOptions:
    """How the file will be written, of which its size depends.

    Args:
        codec: as in ``Packed.save``.
        half_untouched, fold_norms: as in ``Compressor.finish``, which takes these where it is not told.
        notes: as in ``Packed.note``; values of the same length do.
    """

    codec: str = "auto"
    half_untouched: bool | None = None
    fold_norms: bool | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    def chosen(self, target: Target, half: bool | None = None, fold: bool | None = None) -> tuple[bool, bool]:
        """Returns whether untouched tensors are halved, and whether norms are folded.

        Args:
            target: what is asked for, which decides where nothing else does.
            half, fold: what is wanted in place of these options; None: these.
        """
        half = self.half_untouched if half is None else half
        return target.chosen(half), target.chosen(self.fold_norms if fold is None else fold)


@dataclass(frozen=True)
class Search:
    """What a search has found.

    Args:
        rate: the price.
        predicted: bytes of the file that were predicted before the last pass; None where the price was given.
        size: bytes of the file, before any training.
        passes: how often all weights were rounded.
    """

    rate: float
    predicted: int | None
    size: int
    passes: int


class PlainSizes:
    """Predicts the bytes of indices at any price, by rounding the dense weights without error feedback.

    Args:
        weights: of the tensors that have a price.
        curvature: the mean curvature of each; None: all alike.
    """

    def __init__(self, weights: Mapping[Site, Tensor], curvature: Mapping[Site, float] | None) -> None:
        self.weights, self.curvature = weights, curvature
        self._known: dict[float, float] = {}
        self._ratios: list[tuple[float, float]] = []  # logarithms of prices, and of real to plain sizes

    def at(self, rate: float) -> float:
        """Returns the entropy of all indices at a price, in bytes."""
        if rate not in self._known:
            self._known[rate] = sum(self._of(site, weights, rate) for site, weights in self.weights.items())
        return self._known[rate]

    def rate_of(self, size: float) -> float:
        """Returns about the price at which the indices take so many bytes."""
        low, high = math.log(LEAST_RATE), math.log(MOST_RATE)
        for _ in range(24):
            middle = (low + high) / 2
            low, high = (middle, high) if self.expected(math.exp(middle)) > size else (low, middle)
        return float(f"{math.exp(high):.4g}")

    def expected(self, rate: float) -> float:
        """Returns the bytes that indices are expected to take with error feedback, from the passes made so far."""
        if not self._ratios:
            return FIRST_RATIO * self.at(rate)
        (place, ratio), (other, its) = self._ratios[-1], self._ratios[-2 if len(self._ratios) > 1 else -1]
        slope = (its - ratio) / (other - place) if other != place else 0.0
        away = min(max(math.log(rate) - place, -FAR), FAR)
        return math.exp(ratio + min(max(slope, -MOST_SLOPE), MOST_SLOPE) * away) * self.at(rate)

    def learn(self, rate: float, size: int) -> None:
        """Notes the bytes that indices took in a pass."""
        self._ratios.append((math.log(rate), math.log(max(size, 1) / max(self.at(rate), 1.0))))

    def _of(self, site: Site, weights: Tensor, rate: float) -> float:
        flat = weights.detach().reshape(-1).float()
        step = grid_step(rate, 1.0 if self.curvature is None else self.curvature[site], flat)
        return entropy((flat / step).round().int()) * len(flat) / 8


def find_rate_for_size(target: int, floor: int, plain: PlainSizes, size_at: Callable[[float], int]) -> Search:
    """Returns the price at which the file is at most the target, and within 2 % of it where that can be.

    Args:
        target: bytes of the file.
        floor: bytes of the file when all weights are zero.
        plain: predicts the bytes of indices.
        size_at: rounds all weights at a price, and returns the bytes of the file.

    Raises:
        UsageError: the target is below the floor.
    """
    if target < floor:
        raise UsageError(
            f"a target of {target:,} bytes cannot be reached: with all weights zero the file takes {floor:,} bytes; "
            "ask for more, or share or halve what is untouched"
        )
    best: Search | None = None
    size = 0  # of the last file
    low, high = LEAST_RATE, MOST_RATE  # the prices of files that were too large, and small enough
    for passes in range(1, MOST_PASSES + 1):
        rate = plain.rate_of(max(AIM * target, (floor + target) / 2) - floor)
        if not low < rate < high or passes > PREDICTED_PASSES:
            rate = _unpredicted(low, high, size, target)
        predicted = floor + round(plain.expected(rate))
        size = size_at(rate)
        _log.debug("rate %.4g: %d bytes, %d predicted", rate, size, predicted)
        plain.learn(rate, size - floor)
        if size <= target:
            best = Search(rate, predicted, size, passes)
            high = rate
        else:
            low = rate
        if (best and best.size >= NEAR * target) or high / low < CLOSE:
            break
    if best is None:  # no price between that of the floor and the next gives anything smaller
        least = size_at(MOST_RATE)
        if least > target:
            raise UsageError(f"a target of {target:,} bytes cannot be reached: the file takes at least {least:,} bytes")
        return Search(MOST_RATE, floor, least, passes + 1)
    return replace(best, size=best.size if rate == best.rate else size_at(best.rate), passes=passes)


def _unpredicted(low: float, high: float, size: int, target: int) -> float:
    """Returns a price between two; a little beyond the only one that was tried, where its file is nearly the target.

    Args:
        low: the highest price of a file that was too large; ``LEAST_RATE``: there was none.
        high: the lowest price of a file that was small enough; ``MOST_RATE``: there was none.
        size: bytes of the last file.
        target: bytes that are wanted.
    """
    rate = math.sqrt(low * high)
    if target < size < NEARLY * target and high == MOST_RATE:
        rate = min(low * BEYOND, rate)
    elif target < NEARLY * size and low == LEAST_RATE:
        rate = max(high / BEYOND, rate)
    return float(f"{rate:.4g}")


def find_rate_for_drop(allowed: float, size_at: Callable[[float], int], drop: Callable[[], float]) -> Search:
    """Returns about the highest price at which top-1 drops at most so much.

    Args:
        allowed: points of top-1, 0 to 100.
        size_at: rounds all weights at a price, and returns the bytes of the file.
        drop: the points that the model of the last price has lost.

    Raises:
        UsageError: none of the prices tried keeps top-1.
    """
    good: tuple[float, int] | None = None
    low, high, rate, passes = LEAST_RATE, MOST_RATE, 1e-7, 0
    for _ in range(DROP_PASSES):
        passes += 1
        size = size_at(rate)
        lost = drop()
        _log.debug("rate %.4g: %d bytes, %.2f points lost", rate, size, lost)
        if lost <= allowed:
            low = rate
            good = rate, size
        else:
            high = rate
        step = math.sqrt(high / low) if low > LEAST_RATE and high < MOST_RATE else WIDEST_DROP_STEP
        if step < 1.05:
            break
        rate = low * step if low > LEAST_RATE else high / step
    if good is None:
        raise UsageError(f"max_drop={allowed}: top-1 drops by more even at a price of {high:.1e}; allow more")
    if rate != good[0]:
        size_at(good[0])
    return Search(good[0], None, good[1], passes)
