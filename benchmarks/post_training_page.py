"""The tables and the figure of ``post_training.py``, computed from its rows."""

from __future__ import annotations

import math
from importlib.util import find_spec
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from rate_curves import common_range, geometric_mean, mean_ratio

__all__ = ["draw", "tables"]

Rows = list[dict[str, Any]]
Point = tuple[float, float]
LEAST = 0.99  # of the dense top-1
BITS = 1.5, 5.0  # per weight, where weights alone are compared
STYLES = {"nncodec": "s-", "images": "o-", "synthetic": "^-"}
COLOURS = {"nncodec": "tab:grey", "images": "tab:blue", "synthetic": "tab:orange"}
LABELS = {"nncodec": "NNCodec", "images": "images", "synthetic": "no image"}


def tables(rows: Rows) -> dict[str, str]:
    """Returns the Markdown tables by name: summary, palettes, targets, weights and rows."""
    parts = {"summary": summary, "palettes": palettes, "targets": targets, "weights": weights, "rows": all_rows}
    return {name: table(rows) for name, table in parts.items()}


def select(rows: Rows, net: str, method: str) -> Rows:
    """Returns the rows of a network and a method."""
    return [row for row in rows if (row["net"], row["method"]) == (net, method)]


def curves(rows: Rows, net: str, method: str) -> list[list[Point]]:
    """Returns (bytes, top-1) of all settings, one list a seed."""
    points: dict[int, list[Point]] = {}
    for row in select(rows, net, method):
        points.setdefault(row["seed"], []).append((row["file"], row["top1"]))
    return [sorted(same) for _, same in sorted(points.items())]


def nets(rows: Rows) -> list[str]:
    """Returns the networks that there are rows of, in the order of the rows."""
    return list(dict.fromkeys(row["net"] for row in rows))


def weight_ratio(rows: Rows, net: str, parts: tuple[str, ...]) -> float | None:
    """Returns our bits over NNCodec's at equal SQNR, where NNCodec takes ``BITS`` per weight."""
    peer, ours = (
        [(8 * sum(row[part] for part in parts) / row["weights"], row["sqnr"]) for row in select(rows, net, method)]
        for method, parts in (("nncodec, weights alone", ("file",)), ("weights alone", parts))
    )
    if not peer or not ours:
        return None
    return mean_ratio(ours, peer, *(sqnr_at(peer, bits) for bits in BITS))


def sqnr_at(points: list[Point], bits: float) -> float:
    """Returns the SQNR at a number of bits per weight, linear in their logarithm."""
    points = sorted(points)
    for (left, low), (right, high) in pairwise(points):
        if left <= bits <= right:
            return low + (high - low) * math.log(bits / left) / math.log(right / left)
    return points[0][1] if bits < points[0][0] else points[-1][1]


def summary(rows: Rows) -> str:
    """Returns our size over NNCodec's at equal quality, of each network and their geometric mean."""
    columns: dict[str, dict[str, float | None]] = {"images": {}, "synthetic": {}}
    lines = [
        "| network | dense % | images: to % | bytes / NNCodec's | no image: to % | bytes / NNCodec's |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for net in nets(rows):
        dense = select(rows, net, "dense")[0]["top1"]
        cells = [net, f"{100 * dense:.2f}"]
        for method, column in columns.items():
            ratios, ends = [], []
            for ours, peer in product(curves(rows, net, method), curves(rows, net, "nncodec")):
                if (found := mean_ratio(ours, peer, LEAST * dense)) and (reached := common_range(ours, peer)):
                    ratios.append(found)
                    ends.append(reached[1])
            column[net] = geometric_mean(ratios) if ratios else None
            spread = f" ({min(ratios):.3f} to {max(ratios):.3f})" if len(ratios) > 1 else ""
            cells += [f"{100 * min(ends):.2f}" if ends else "", ratio(column[net]) + spread]
        lines.append(f"| {' | '.join(cells)} |")
    means = [mean(column) for column in columns.values()]
    return "\n".join([*lines, f"| geometric mean | | | {means[0]} | | {means[1]} |"])


def palettes(rows: Rows) -> str:
    """Returns our size over that of each kind of coremltools' palettes at equal quality, without any image and with."""
    kinds = [method for method in dict.fromkeys(row["method"] for row in rows) if method.startswith("coremltools")]
    pairs = [*product(("synthetic", "images"), kinds)]
    names = [f"{LABELS[ours]} / {peer.partition(', ')[2]}" for ours, peer in pairs]
    lines = [f"| network | {' | '.join(names)} |", "|---" + "|--:" * len(pairs) + "|"]
    columns: dict[tuple[str, str], dict[str, float | None]] = {pair: {} for pair in pairs}
    for net in nets(rows):
        low = LEAST * select(rows, net, "dense")[0]["top1"]
        for pair, column in columns.items():
            compared = product(*(curves(rows, net, method) for method in pair))
            ratios = [found for ours, peer in compared if (found := mean_ratio(ours, peer, low))]
            column[net] = geometric_mean(ratios) if ratios else None
        lines.append(f"| {' | '.join([net, *(ratio(column[net]) for column in columns.values())])} |")
    return "\n".join([*lines, f"| geometric mean | {' | '.join(mean(column) for column in columns.values())} |"])


def mean(column: dict[str, float | None]) -> str:
    """Returns the geometric mean of the ratios that there are, as text."""
    known = [value for value in column.values() if value is not None]
    return ratio(geometric_mean(known) if known else None)


def ratio(value: float | None) -> str:
    """Returns a ratio as text."""
    return "" if value is None else f"{value:.3f}"


def targets(rows: Rows) -> str:
    """Returns what a target took and gave."""
    lines = [
        "| network | what | file bytes | dense % | top-1 % (n = 10,000) | 95 % | CPU s | wall s | passes "
        "| peak MB | times dense |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in (row for row in rows if "peak" in row):
        dense = select(rows, row["net"], "dense")[0]
        cells = [
            row["net"], f"{row['method']} {row['setting']:,.0f}", f"{row['file']:,}", f"{100 * dense['top1']:.2f}",
            f"{100 * row['top1']:.2f}", interval(row), f"{row['cpu_seconds']:.0f}", f"{row['seconds']:.0f}",
            str(row.get("passes", "")), f"{row['peak'] / 1e6:.1f}", f"{row['peak'] / dense['file']:.1f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def weights(rows: Rows) -> str:
    """Returns bits per weight at equal SQNR of the weights alone."""
    lines = [
        "| network | weights | SQNR compared, dB | bits / NNCodec's | the same, with our header |",
        "|---|--:|--:|--:|--:|",
    ]
    columns: dict[tuple[str, ...], dict[str, float | None]] = {("coded",): {}, ("coded", "header"): {}}
    for net in nets(rows):
        peer = select(rows, net, "nncodec, weights alone")
        if not peer:
            continue
        points = [(8 * row["file"] / row["weights"], row["sqnr"]) for row in peer]
        for parts, column in columns.items():
            column[net] = weight_ratio(rows, net, parts)
        cells = [net, f"{peer[0]['weights']:,}", " - ".join(f"{sqnr_at(points, bits):.1f}" for bits in BITS)]
        lines.append(f"| {' | '.join([*cells, *(ratio(column[net]) for column in columns.values())])} |")
    return "\n".join([*lines, f"| geometric mean | | | {' | '.join(mean(column) for column in columns.values())} |"])


def all_rows(rows: Rows) -> str:
    """Returns all rows that have a top-1, means over the seeds; the interval is that of the first seed."""
    lines = [
        "| network | method | setting | seeds | file bytes | bits/weight | top-1 % (n = 10,000) | 95 % | CPU s |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    methods = list(dict.fromkeys(row["method"] for row in rows if "top1" in row))
    shared = {row["net"]: row["weights"] for row in rows if "weights" in row}
    for net in nets(rows):
        for method in methods:
            found = select(rows, net, method)
            for setting in sorted({row["setting"] for row in found}):
                same = [row for row in found if row["setting"] == setting]
                lines.append(f"| {' | '.join([net, method, *cells_of(same, shared.get(net))])} |")
    return "\n".join(lines)


def cells_of(same: Rows, shared: int | None) -> list[str]:
    """Returns the cells of one line after the names."""
    top1 = [100 * row["top1"] for row in same]
    spread = f" ({min(top1):.2f} to {max(top1):.2f})" if len(top1) > 1 else ""
    size = sum(row["file"] for row in same) / len(same)
    seconds = [row["cpu_seconds"] for row in same if "cpu_seconds" in row]
    setting = same[0]["setting"]
    return [
        "" if same[0]["method"] == "dense" else f"{setting:,.0f}" if abs(setting) >= 1 else f"{setting:.0e}",
        str(len(same)), f"{size:,.0f}", f"{8 * size / shared:.3f}" if shared else "",
        f"{sum(top1) / len(top1):.2f}{spread}", interval(same[0]),
        f"{sum(seconds) / len(seconds):.0f}" if seconds else "",
    ]  # fmt: skip


def interval(row: dict[str, Any]) -> str:
    """Returns the 95 % interval of top-1, in per cent."""
    low, high = row["interval"]
    return f"[{100 * low:.2f}, {100 * high:.2f}]"


def size_text(size: float) -> str:
    """Returns a round size in bytes as text."""
    return f"{size / 1e6:g} MB" if size >= 1e6 else f"{size / 1e3:g} KB"


def draw(rows: Rows, path: Path) -> None:
    """Draws top-1 over file bytes, one panel a network; does nothing where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        print("no matplotlib: the figure is not drawn (pip install '.[report]')")
        return
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    names = nets(rows)
    figure = Figure(figsize=(9, 3.4 * math.ceil(len(names) / 2)), layout="constrained")
    panels = figure.subplots(math.ceil(len(names) / 2), 2, squeeze=False).flat
    for net, axes in zip(names, panels, strict=False):
        dense = 100 * select(rows, net, "dense")[0]["top1"]
        axes.axhline(dense, color="black", linewidth=1, label="dense")
        axes.axhline(LEAST * dense, color="black", linewidth=1, linestyle=":", label="99 % of dense")
        for method, style in STYLES.items():
            for seed, points in enumerate(curves(rows, net, method)):
                sizes, accuracies = [size for size, _ in points], [100 * top1 for _, top1 in points]
                label = None if seed else LABELS[method]
                axes.plot(sizes, accuracies, style, color=COLOURS[method], label=label, ms=4)
        for row in select(rows, net, "target"):
            axes.plot(row["file"], 100 * row["top1"], "*", color="crimson", ms=11, zorder=3, label="target size")
        axes.set(
            title=net, xscale="log", ylim=(0.96 * dense, 1.005 * dense), xlabel="size of the file", ylabel="top-1 %"
        )
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: size_text(size)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
