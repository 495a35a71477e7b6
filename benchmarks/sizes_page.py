"""The first figure and table of ``docs/results.md``: top-1 over bytes, computed from the rows of two benchmarks.

``rate_accuracy.py`` trains to a size, ``post_training.py`` packs without training, beside NNCodec.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from figures import new_figure, save_figure, size_axis

__all__ = ["draw", "points", "table"]

Rows = list[dict[str, Any]]
CURVES = {  # how the figure calls a curve: its colour and style
    "trained to a size": ("tab:red", "*"),
    "packed with 256 images": ("tab:blue", "o-"),
    "packed with no image": ("tab:orange", "^-"),
    "NNCodec": ("tab:grey", "s-"),
}
METHODS = {"images": "packed with 256 images", "synthetic": "packed with no image", "nncodec": "NNCodec"}
SHOWN = 0.96  # of the dense top-1: the figure shows no less


def points(trained: Rows, packed: Rows) -> list[Any]:
    """Returns all that the figure shows: network, curve, seed, bytes and top-1; no seed where it is one dense network.

    Args:
        trained: rows of ``rate_accuracy.py``.
        packed: rows of ``post_training.py``.
    """
    found = [
        [row["net"], "trained to a size", row["seed"], row["file"], row["top1"]] for row in trained if row["target"] > 0
    ]
    found += [[row["net"], "dense", 0, row["file"], row["top1"]] for row in trained if row["target"] == 0]
    found += [
        [row["net"], METHODS[row["method"]], row["seed"], row["file"], row["top1"]]
        for row in packed
        if row["method"] in METHODS
    ]
    return sorted(found)


def table(trained: Rows) -> str:
    """Returns a Markdown table of the networks that were trained to a size, and what they were before."""
    lines = [
        "| network | target, bytes | seed | file, bytes | times smaller | top-1 % | 95 % | dense % |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    dense = {row["net"]: row for row in trained if row["target"] == 0}
    for row in sorted(
        (row for row in trained if row["target"] > 0),
        key=lambda row: (list(dense).index(row["net"]), -row["target"], row["seed"]),
    ):
        low, high = row["interval"]
        cells = [row["net"], f"{row['target']:,}", str(row["seed"]), f"{row['file']:,}"]
        cells += [f"{row['dense_file'] / row['file']:.0f}", f"{100 * row['top1']:.2f}"]
        cells += [f"[{100 * low:.2f}, {100 * high:.2f}]", f"{100 * dense[row['net']]['top1']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(trained: Rows, packed: Rows, path: Path) -> None:
    """Draws top-1 over bytes, a panel a network; does nothing where matplotlib is missing."""
    nets = [row["net"] for row in trained if row["target"] == 0]
    shown = points(trained, packed)
    made = new_figure(-(-len(nets) // 2), 2)
    if made is None:
        return
    figure, panels = made
    for net, axes in zip(nets, (axes for row in panels for axes in row), strict=False):
        (top,) = (100 * one[4] for one in shown if one[:2] == [net, "dense"])
        axes.axhline(top, color="black", linewidth=1, label="dense")
        for name, (colour, style) in CURVES.items():
            for seed in sorted({one[2] for one in shown if one[:2] == [net, name]}):
                sizes, accuracies = zip(
                    *((one[3], 100 * one[4]) for one in shown if one[:3] == [net, name, seed]), strict=True
                )
                big = 11 if style == "*" else 4
                axes.plot(sizes, accuracies, style, color=colour, ms=big, lw=1.2, label=None if seed else name)
        axes.set(title=net, xscale="log", ylim=(SHOWN * top, 1.01 * top), xlabel="bytes of the file (log)")
        axes.set_ylabel("top-1 %")
        axes.tick_params(labelsize=8)
        size_axis(axes.xaxis)
        axes.grid(alpha=0.3, which="both")
    panels[0][0].legend(fontsize=8, loc="lower right")
    save_figure(figure, path, shown)
