"""The picture of all configurations: top-1 against the size of the file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compressor.comparison.drawing import BLUE, GREY, ORANGE, TEAL, Picture
from compressor.comparison.front import Bounds, Choice, by_configuration, front
from compressor.comparison.points import Configuration
from compressor.report.size_text import size_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["front_picture", "size_marks"]

STEPS = 1, 1.5, 2, 3, 5, 7  # of the marks of a scale, times a power of ten
MOST_MARKS, INCHES_A_MARK = 8, 1.4
NARROW = 7.0  # inches of a picture in which few words stand beside each other


def front_picture(
    configurations: Sequence[Configuration],
    chosen: Sequence[Choice],
    bounds: Bounds,
    data: str,
    size: tuple[float, float] = (10.0, 5.0),
) -> Picture:
    """Returns the picture of configurations that were measured on the same images.

    Args:
        configurations: to draw; those without a top-1 are left out.
        chosen: are named in the picture.
        bounds: are drawn as lines.
        data: the images, in words.
        size: of the picture, in inches.
    """

    def draw(figure: Figure, axes: list[Axes]) -> None:
        (axis,) = axes
        shown = [one for one in configurations if one.top1 is not None]
        line = front(shown)
        _dominated(axis, [one for one in shown if one not in line])
        _front(axis, line)
        _dense(axis, shown)
        _bounds(axis, bounds)
        _names(axis, chosen)
        axis.set(xscale="log", xlabel="bytes of the file, logarithmic", ylabel=f"top-1, %, {data}")
        _scale_of_bytes(axis, min(MOST_MARKS, int(size[0] / INCHES_A_MARK)))
        axis.margins(x=0.08, y=0.12)
        figure.legend(loc="outside upper left", ncols=2 if size[0] < NARROW else 6, handlelength=1.5)

    return Picture(f"top-1 against bytes, {data}", draw, size)


def _dominated(axis: Axes, ones: Sequence[Configuration]) -> None:
    if ones:
        axis.plot(
            [one.bytes for one in ones], [_percent(one.top1) for one in ones], "x", color=GREY, ms=6,
            label="beaten by another",
        )  # fmt: skip


def _front(axis: Axes, line: Sequence[Configuration]) -> None:
    if not line:
        return
    sizes, shares = [one.bytes for one in line], [_percent(one.top1) for one in line]
    axis.plot(sizes, shares, "o-", color=BLUE, ms=6, lw=1.5, label="front")
    intervals = [one.interval or (0.0, 0.0) for one in line]
    lows, highs = ([_percent(interval[side]) for interval in intervals] for side in (0, 1))
    axis.vlines(sizes, lows, highs, color=BLUE, alpha=0.3, lw=1, label="95 % interval")


def _dense(axis: Axes, shown: Sequence[Configuration]) -> None:
    dense = sorted({(one.best.dense_bytes, one.best.dense_top1) for one in shown if one.best.dense_top1 is not None})
    if dense:
        sizes, shares = zip(*dense, strict=True)
        axis.plot(sizes, [_percent(share) for share in shares], "*", color=ORANGE, ms=13, label="dense")


def _bounds(axis: Axes, bounds: Bounds) -> None:
    style: dict[str, Any] = {"color": TEAL, "ls": "--", "lw": 1.2}
    if bounds.size is not None:
        axis.axvline(bounds.size, label=f"bound {size_text(bounds.size)}", **style)
    if bounds.top1 is not None:
        axis.axhline(_percent(bounds.top1), label=f"bound {100 * bounds.top1:g} %", **style)


def _names(axis: Axes, chosen: Sequence[Choice]) -> None:
    """Writes beside each chosen configuration what it was chosen for."""
    for same in by_configuration(chosen):
        one, names = same[0].configuration, ", ".join(choice.title.lower() for choice in same)
        place = one.bytes, _percent(one.top1)
        axis.annotate(names, place, xytext=(8, -16), textcoords="offset points", fontweight="bold")


def _percent(share: float | None) -> float:
    return 100 * (share or 0.0)


def _scale_of_bytes(axis: Axes, most: int) -> None:
    """Marks the scale with sizes as people write them, not so many that they meet."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    axis.autoscale_view()
    axis.xaxis.set_major_locator(FixedLocator(size_marks(*axis.get_xlim(), most)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda size, _: size_text(size)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_minor_formatter(NullFormatter())


def size_marks(low: float, high: float, most: int) -> list[int]:
    """Returns the sizes to mark on a scale from ``low`` to ``high`` bytes: at most ``most``, and two where there are.

    From 9,000 to 60,000 they are 10,000, 15,000, 20,000, 30,000 and 50,000.
    """
    from matplotlib.ticker import MaxNLocator

    marks = [int(step * 10**power) for power in range(1, 12) for step in STEPS if low <= step * 10**power <= high]
    if len(marks) < 2:  # the files are of nearly one size
        equal = MaxNLocator(most, integer=True).tick_values(low, high)
        marks = [int(mark) for mark in equal if low <= mark <= high]
    return marks[:: max(1, -(-len(marks) // most))]
