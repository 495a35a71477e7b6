"""The table, the figure and the reading of ``peers.py``, computed from its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from figures import new_figure, save_figure, size_axis

__all__ = ["draw", "points", "reading", "table"]

Rows = list[dict[str, Any]]
DENSE = "dense", "dense, trained on"
OURS = "to a size", "learnt", "Deep Compression"
NAMES = {  # method: how the table calls it, what its setting is, when it shares or rounds
    "dense": ("dense", "", ""),
    "dense, trained on": ("dense, trained further", "", ""),
    "to a size": ("ours to a size", "bytes", "while training"),
    "learnt": ("ours with `learnt`", "bits", "while training"),
    "Deep Compression": ("Deep Compression by our schemes", "% zeros", "while training"),
    "DKM": ("DKM (coremltools)", "bits", "while training"),
    "TFMOT": ("clustering (TFMOT)", "clusters", "while training"),
    "NNCodec": ("NNCodec", "qp", "after"),
    "palettes": ("palettes (coremltools)", "bits", "after"),
    "palettes of 8 channels": ("palettes of 8 channels (coremltools)", "bits", "after"),
    "torchao": ("integers (torchao)", "bits", "after"),
}
WITHIN = 0.01, 0.03  # of the dense top-1, in the reading
SHOWN = 0.9  # of the dense top-1: the figure shows no less


def nets(rows: Rows) -> list[str]:
    """Returns the networks that there are rows of."""
    return list(dict.fromkeys(row["net"] for row in rows))


def select(rows: Rows, net: str, method: str) -> Rows:
    """Returns the rows of a method, the smallest file first."""
    return sorted(
        (row for row in rows if (row["net"], row["method"]) == (net, method)), key=lambda row: int(row["file"])
    )


def points(rows: Rows) -> list[Any]:
    """Returns all that the figure shows."""
    return sorted([row["net"], row["method"], row["file"], row["top1"]] for row in rows)


def table(rows: Rows) -> str:
    """Returns a Markdown table of all rows."""
    lines = [
        "| network | tool | setting | shares or rounds | file bytes | times smaller | top-1 % | 95 % | CPU s |",
        "|---|---|--:|---|--:|--:|--:|--:|--:|",
    ]
    for net in nets(rows):
        for method, (name, unit, when) in NAMES.items():
            for row in select(rows, net, method):
                low, high = row["interval"]
                cells = [net, name, f"{row['setting']:,} {unit}" if unit else "", when, f"{row['file']:,}"]
                cells += [f"{row['dense_file'] / row['file']:.1f}", f"{100 * row['top1']:.2f}"]
                lines.append(f"| {' | '.join(cells)} | [{100 * low:.2f}, {100 * high:.2f}] | {row['cpu_seconds']} |")
    return "\n".join(lines) if rows else "No row has been measured yet."


def reading(rows: Rows) -> str:
    """Returns the smallest file of each tool that loses at most so much, and how many times ours it is."""
    parts = [one for net in nets(rows) for within in WITHIN if (one := least_files(rows, net, within))]
    told = {one.partition(": ")[2]: one for one in reversed(parts)}  # the same files once, for the least loss
    return "\n\n".join(reversed(told.values())) or "No row has been measured yet."


def least_files(rows: Rows, net: str, within: float) -> str:
    """Returns the sentence about one network and one loss."""
    dense = select(rows, net, "dense")
    if not dense:
        return ""
    top1, found, missing = dense[0]["top1"], [], []
    for method in NAMES:
        same = select(rows, net, method)
        good = [row for row in same if row["top1"] >= top1 - within]
        if method not in DENSE and same:
            found += [(good[0]["file"], NAMES[method][0])] if good else []
            missing += [] if good else [NAMES[method][0]]
    if not found:
        return ""
    smallest = min(size for size, _ in found)
    listed = "; ".join(f"{name} {size:,} ({size / smallest:.1f})" for size, name in sorted(found))
    none = f" No row of these is so near: {', '.join(missing)}." if missing else ""
    start = f"`{net}`, at most {100 * within:g} point{'s' if within > 0.01 else ''} below dense ({100 * top1:.2f} %)"
    return f"{start}: the smallest file of each tool, in bytes and in times the smallest of all: {listed}.{none}"


def draw(rows: Rows, path: Path) -> None:
    """Draws top-1 over bytes, a panel a network."""
    made = new_figure(1, max(1, len(nets(rows))))
    if made is None:
        return
    figure, panels = made
    for net, axes in zip(nets(rows), panels[0], strict=False):
        dense = select(rows, net, "dense")
        top = 100 * (dense[0]["top1"] if dense else max(row["top1"] for row in rows))
        axes.axhline(top, color="black", linewidth=1, label="dense")
        for number, (method, (name, _, _)) in enumerate(NAMES.items()):
            same = [(row["file"], 100 * row["top1"]) for row in select(rows, net, method)]
            if not same or method in DENSE:
                continue
            style: dict[str, Any] = (
                {"marker": "o", "lw": 2.2, "ms": 6} if method in OURS else {"marker": "s", "lw": 1, "ms": 5}
            )
            axes.plot(*zip(*same, strict=True), label=name.replace("`", ""), color=f"C{number % 10}", **style)
        axes.set(
            title=net, xscale="log", ylim=(SHOWN * top, 1.008 * top), xlabel="bytes of the file (log)", ylabel="top-1 %"
        )
        size_axis(axes.xaxis)
        axes.grid(alpha=0.3, which="both")
    if rows:
        panels[0][0].legend(fontsize=8)
    save_figure(figure, path, points(rows))
