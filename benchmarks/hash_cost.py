"""Time per weight of the assignment of `learnt`, forward and backward, from one million weights to 200 million.

    OMP_NUM_THREADS=1 python benchmarks/hash_cost.py [--repeat 5] [--figure docs/figures/hash_cost.png]

Normally distributed weights, 16 codewords, one thread: the machine code, the stock operators that it replaces, and a
copy of the weights as the lower bound. The three take turns; figures are medians. The table between the markers of
``README.md`` is rewritten; the figure needs matplotlib.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import click
import torch
from page import put
from tabulate import tabulate

from compressor.ops import gather_scatter
from compressor.ops import nearest as nearest_ops
from compressor.ops.gather_scatter import straight_through

MILLIONS = 1, 3, 10, 30, 100, 200
CODEWORDS = 16
HEADERS = ("million weights", "copy", "machine code", "stock operators", "ratio")


def seconds(run: Callable[[], object]) -> float:
    """Returns the seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def step(weights: torch.Tensor, codebook: torch.Tensor, gradient: torch.Tensor) -> None:
    """Finds the nearest codewords, and computes the gradients of weights and codebook."""
    torch.autograd.grad(straight_through(weights, codebook), [weights, codebook], gradient)


def measure(count: int, repeat: int) -> list[float]:
    """Returns the median nanoseconds per weight of the copy, the machine code and the stock operators."""
    weights = torch.randn(count, requires_grad=True)
    codebook = torch.linspace(-2.5, 2.5, CODEWORDS, requires_grad=True)
    gradient, target = torch.ones(count), torch.empty(count)
    times: list[list[float]] = [[], [], []]
    for _ in range(repeat + 1):
        times[0].append(seconds(lambda: target.copy_(weights.detach())))
        times[1].append(seconds(lambda: step(weights, codebook, gradient)))
        with stock_operators():
            times[2].append(seconds(lambda: step(weights, codebook, gradient)))
    return [1e9 * statistics.median(row[1:]) / count for row in times]  # the first turn warms up


@contextmanager
def stock_operators() -> Iterator[None]:
    """Makes the operators of ``learnt`` run without machine code, as they do where llvmlite is missing."""
    with (
        patch.object(nearest_ops, "available", lambda: False),
        patch.object(gather_scatter, "compiled_kernel", lambda *_, **__: None),
    ):
        yield


def draw(rows: list[list[float]], path: Path) -> None:
    """Draws milliseconds over weights on logarithmic axes: a linear cost is a line of slope 1."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for column in (3, 2, 1):
        axes.loglog([1e6 * row[0] for row in rows], [row[0] * row[column] for row in rows], "o-", label=HEADERS[column])
    axes.set(
        xlabel="weights", ylabel="ms, forward and backward", title="Assignment of learnt, 16 codewords, one thread"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110, bbox_inches="tight")


@click.command()
@click.option("--repeat", default=5)
@click.option("--figure", type=click.Path(path_type=Path))
def main(repeat: int, figure: Path | None) -> None:
    """Measures, rewrites the table, and draws the figure if ``--figure`` is given."""
    torch.set_num_threads(1)
    measured = [(millions, measure(millions * 1_000_000, repeat)) for millions in MILLIONS]
    rows = [[millions, *times, times[2] / times[1]] for millions, times in measured]
    table = tabulate(rows, HEADERS, tablefmt="github", floatfmt=(",.0f", ".1f", ".1f", ".1f", ".1f"))
    print(table)
    put("hash_cost", table)
    if figure is not None:
        draw(rows, figure)


if __name__ == "__main__":
    main()
