"""Which of several configurations are worth having: the front of size and accuracy, and three choices of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from compressor.comparison.points import Configuration

__all__ = ["Bounds", "Choice", "by_configuration", "choices", "front"]

TOLERATED = 0.05  # of all images: what a compact file may lose where no bound says


@dataclass(frozen=True)
class Bounds:
    """What a file must keep to: the most bytes, and the least top-1, 0 to 1; None: any."""

    size: int | None = None
    top1: float | None = None

    def hold(self, one: Configuration) -> bool:
        """Whether a configuration keeps to the bounds."""
        fits = self.size is None or one.bytes <= self.size
        return fits and (self.top1 is None or (one.top1 is not None and one.top1 >= self.top1))


@dataclass(frozen=True)
class Choice:
    """One configuration of the front, and why it may be the one.

    Args:
        title: of the choice.
        reason: why, in a sentence.
        configuration: the one.
    """

    title: str
    reason: str
    configuration: Configuration


def front(configurations: Sequence[Configuration]) -> list[Configuration]:
    """Returns those that no other one beats in both size and top-1, by ascending size.

    Args:
        configurations: those without a measured top-1 are left out. Of two that are equal in both, the first is kept.
    """
    best, kept = -math.inf, []
    measured = [
        (one.bytes, -one.top1, number, one) for number, one in enumerate(configurations) if one.top1 is not None
    ]
    for _, worse, _, one in sorted(measured, key=lambda entry: entry[:3]):
        if -worse > best:
            best = -worse
            kept.append(one)
    return kept


def choices(configurations: Sequence[Configuration], bounds: Bounds) -> list[Choice]:
    """Returns the three choices of the front that keep to the bounds; nothing where none does.

    Quality has the highest top-1. Compact is the smallest that loses at most ``TOLERATED`` of all images against the
    dense model, or that keeps to the bound of top-1 where there is one; where none does, the smallest. Balanced is, of
    those from compact to quality, the one that is nearest to the size of compact and the top-1 of quality, with both
    scaled to 0 ... 1, and size as its logarithm.
    """
    kept = [one for one in front(configurations) if bounds.hold(one)]
    if not kept:
        return []
    quality = kept[-1]
    good = [one for one in kept if bounds.top1 is not None or _is_tolerable(one)]
    compact = (good or kept)[0]
    between = kept[kept.index(compact) :]
    balanced = min(between, key=lambda one: _distance(one, compact, quality))
    why = "keeps to the bound of top-1" if bounds.top1 is not None else f"loses at most {100 * TOLERATED:g} points"
    smallest = f"the smallest that {why}" if good else "the smallest; all lose more than that of a useful file"
    return [
        Choice("Quality", "the highest top-1", quality),
        Choice("Balanced", "nearest to the size of compact and the top-1 of quality", balanced),
        Choice("Compact", smallest, compact),
    ]


def by_configuration(chosen: Sequence[Choice]) -> list[list[Choice]]:
    """Returns the choices, those of one configuration together; others may have the same name."""
    together: dict[int, list[Choice]] = {}
    for choice in chosen:
        together.setdefault(id(choice.configuration), []).append(choice)
    return list(together.values())


def _is_tolerable(one: Configuration) -> bool:
    dense = one.best.dense_top1
    return one.top1 is not None and (dense is None or one.top1 >= dense - TOLERATED)


def _distance(one: Configuration, compact: Configuration, quality: Configuration) -> float:
    """Returns how far a configuration is from the best of both, squared."""
    assert one.top1 is not None
    assert compact.top1 is not None
    assert quality.top1 is not None
    sizes = math.log(quality.bytes / compact.bytes) or 1.0
    shares = (quality.top1 - compact.top1) or 1.0
    return (math.log(one.bytes / compact.bytes) / sizes) ** 2 + ((quality.top1 - one.top1) / shares) ** 2
