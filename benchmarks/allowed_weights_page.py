"""The tables, the figure and the reading of ``allowed_weights.py``, computed from its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from figures import new_figure, save_figure, size_axis

__all__ = ["draw", "points", "reading", "table"]

Rows = list[dict[str, Any]]
NETS = {"test_resnet": "one epoch of training", "resnet18": "256 images, no training"}
SERIES = (
    "learnt", "learnt, one codebook", "kmeans", "diffquant", "uniform", "fixed", "inq", "ttq", "hashed", "wfn",
    "learnt, price",
)  # fmt: skip
OUTCOMES = "wfn", "learnt, price"  # whose number of values is an outcome
WITHIN = 0.01  # of the dense top-1, in the reading
SHOWN = 0.88  # of the dense top-1: the figure shows no less


def mine(rows: Rows, net: str, series: str) -> Rows:
    """Returns the rows of a curve, those of fewer values first."""
    return sorted(
        (row for row in rows if (row["net"], row["series"]) == (net, series)),
        key=lambda row: (values(row), row["file"]),
    )


def values(row: dict[str, Any]) -> int:
    """Returns how many values a tensor may have; where that is an outcome, how many the richest one has."""
    return int(row["used"] if row["allowed"] is None else row["allowed"])


def points(rows: Rows, dense: dict[str, float]) -> list[Any]:
    """Returns all that the figure shows."""
    shown = [[row["net"], row["series"], values(row), row["file"], row["top1"]] for row in rows]
    return [sorted(dense.items()), sorted(shown)]


def table(rows: Rows, net: str) -> str:
    """Returns a Markdown table: a line for each number of values, with top-1 and kilobytes of each scheme."""
    found = {name: mine(rows, net, name) for name in SERIES if name not in OUTCOMES}
    found = {name: same for name, same in found.items() if same}
    lines = [f"| values | {' | '.join(found)} |", f"|--:|{'--:|' * len(found)}"]
    for number in sorted({values(row) for same in found.values() for row in same}):
        cells = [next((cell(row) for row in same if values(row) == number), "") for same in found.values()]
        lines.append(f"| {number} | {' | '.join(cells)} |")
    return "\n".join(lines) if found else "No row has been measured yet."


def outcomes(rows: Rows, net: str) -> str:
    """Returns a Markdown table of the curves whose number of values is an outcome."""
    lines = [
        "| scheme | setting | values of the richest tensor | values in all | top-1 %, KB |",
        "|---|--:|--:|--:|--:|",
    ]
    for name in OUTCOMES:
        for row in mine(rows, net, name):
            setting = next(f"{key} {value:g}" for key, value in row["settings"].items() if key != "scheme")
            lines.append(f"| {name} | {setting} | {row['used']} | {row['unique']:,} | {cell(row)} |")
    return "\n".join(lines) if len(lines) > 2 else "No row has been measured yet."


def cell(row: dict[str, Any]) -> str:
    """Returns top-1 in per cent, and the size of the file in kilobytes.

    >>> cell({"top1": 0.92051, "file": 80376})
    '92.05, 80'
    """
    return f"{100 * row['top1']:.2f}, {row['file'] / 1000:,.0f}"


def reading(rows: Rows, net: str, dense: float) -> str:
    """Returns what the rows of a network say: how few values each scheme needs, and which file is the smallest."""
    least, found = dense - WITHIN, []
    for name in SERIES:
        good = [row for row in mine(rows, net, name) if row["top1"] >= least]
        if good:
            found.append((values(good[0]), name, good[0]["file"]))
    total = sum(row["net"] == net for row in rows)
    start = f"`{net}` ({NETS[net]}, dense {100 * dense:.2f} %, rows measured: {total})"
    if not found:
        return f"{start}: none of the rows measured is within {100 * WITHIN:g} point of dense."
    few = "; ".join(f"{name} {count} ({size / 1000:,.0f} KB)" for count, name, size in sorted(found))
    good = [row for row in rows if row["net"] == net and row["top1"] >= least]
    best = min(good, key=lambda row: int(row["file"]))
    never = [name for name in SERIES if mine(rows, net, name) and name not in {name for _, name, _ in found}]
    lost = f" Not with any number measured: {', '.join(never)}." if never else ""
    return (
        f"{start}: the fewest values with which each scheme stays within {100 * WITHIN:g} point of dense, and the file "
        f"they give: {few}.{lost} The smallest such file has {best['file']:,} bytes and {100 * best['top1']:.2f} % "
        f"(`{best['series']}`, {values(best)} values in the richest tensor).{flattening(rows, net)}"
    )


def flattening(rows: Rows, net: str) -> str:
    """Returns what 16 and 256 values differ by, where a scheme has both."""
    gains, factors = [], []
    for name in SERIES:
        by = {values(row): row for row in mine(rows, net, name) if row["allowed"] is not None}
        if name != "hashed" and 16 in by and 256 in by:
            gains.append(100 * (by[256]["top1"] - by[16]["top1"]))
            factors.append(by[256]["file"] / by[16]["file"])
    if not gains:
        return ""
    change = f"{min(gains):+.2f}" if len(gains) == 1 else f"{min(gains):+.2f} to {max(gains):+.2f}"
    times = f"{min(factors):.1f}" if len(factors) == 1 else f"{min(factors):.1f} to {max(factors):.1f}"
    return f" From 16 to 256 values top-1 changes by {change} points, and the file takes {times} times the bytes."


def draw(rows: Rows, dense: dict[str, float], path: Path) -> None:
    """Draws top-1 over the number of values and over bytes, a row of panels a network."""
    made = new_figure(len(NETS), 2)
    if made is None:
        return
    figure, panels = made
    colours = {name: f"C{number}" for number, name in enumerate(SERIES[:-1])} | {SERIES[-1]: "crimson"}  # C10 is C0
    for net, (left, right) in zip(NETS, panels, strict=True):
        top = 100 * dense[net]
        for axes in (left, right):
            axes.axhline(top, color="black", linewidth=1, label="dense")
            axes.set(ylim=(SHOWN * top, 1.008 * top), ylabel="top-1 %", title=f"{net}: {NETS[net]}")
            axes.grid(alpha=0.3, which="both")
        for name in (name for name in SERIES if mine(rows, net, name)):
            same = mine(rows, net, name)
            top1, marker = [100 * row["top1"] for row in same], "*" if name in OUTCOMES else "o"
            style = {"color": colours[name], "marker": marker, "ms": 5, "lw": 1.2}
            style["linestyle"] = "--" if name in OUTCOMES else "-"
            left.plot([values(row) for row in same], top1, label=name, **style)
            by_size = sorted((row["file"], 100 * row["top1"]) for row in same)
            right.plot([size for size, _ in by_size], [accuracy for _, accuracy in by_size], **style)
        left.set_xscale("log", base=2)
        left.set_xlabel("values that a tensor may have (log)")
        left.xaxis.set_major_formatter(lambda number, _: f"{number:g}")
        right.set(xscale="log", xlabel="bytes of the file (log)")
        size_axis(right.xaxis)
        left.legend(fontsize=8, ncols=2, loc="lower right")
    save_figure(figure, path, points(rows, dense))
