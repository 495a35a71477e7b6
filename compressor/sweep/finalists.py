"""Which configurations of a sweep are worth training, judged by files that were not trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compressor.sweep.grid import Row

__all__ = ["by_sharing", "finalists", "untrained"]

TRAINING = ("epochs", "lr", "distill", "teacher", "seed")
"""Options that an untrained file does not depend on, or hardly."""


def by_sharing(rows: Sequence[Row]) -> list[list[Row]]:
    """Puts the rows together that share values alike, and differ by their training and seeds alone."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        sharing = {key: value for key, value in row.options.items() if key not in TRAINING}
        groups.setdefault(repr(sharing), []).append(row)
    return list(groups.values())


def untrained(row: Row) -> Row:
    """Returns a row that shares values as another one does, and trains nothing."""
    return Row(row.name, {**row.options, "epochs": 0})


def finalists(figures: Mapping[str, tuple[float, float]], count: int) -> list[str]:
    """Returns the names of the best by two figures, both of which are to be small.

    First come those that no other one beats in both, by ascending first figure; then those that only these beat, and so
    on. Of the last of these layers, where not all have a place, some are taken at equal steps, its ends first.

    Args:
        figures: size and loss, by name.
        count: how many at most.

    Example:
        >>> finalists({"small": (1, 9), "good": (9, 1), "both": (2, 2), "worse": (3, 3)}, 3)
        ['small', 'both', 'good']
        >>> finalists({"small": (1, 9), "good": (9, 1), "both": (2, 2), "worse": (3, 3)}, 2)
        ['small', 'good']
    """
    chosen: list[str] = []
    left = dict(sorted(figures.items(), key=lambda item: item[1]))
    while left and len(chosen) < count:
        layer, least = [], float("inf")
        for name, (_, loss) in left.items():
            if loss < least:
                least = loss
                layer.append(name)
        if not layer:  # of what is left, no loss is a number
            break
        chosen += _spread(layer, count - len(chosen))
        left = {name: pair for name, pair in left.items() if name not in layer}
    return chosen


def _spread(names: Sequence[str], count: int) -> list[str]:
    """Returns so many of some names at equal steps, first and last among them; of a single one the middle."""
    if len(names) <= count:
        return list(names)
    if count == 1:
        return [names[len(names) // 2]]
    return [names[round(place * (len(names) - 1) / (count - 1))] for place in range(count)]
