"""Draws docs/figures/learnt.png: the assignment of ``learnt`` and its slope, hard and at several temperatures.

python docs/figures/learnt.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib import pyplot

from compressor.ops.nearest import nearest
from compressor.ops.soft_assignment import soft_assignment

CODEBOOK = torch.tensor([-1.0, -0.35, 0.15, 0.5, 1.2])
TEMPERATURES = {"1 (nearly the identity)": 1.0, "1/4": 0.25, "1/32": 1 / 32}


def main() -> None:
    """Draws value and slope side by side."""
    weights = torch.linspace(-1.5, 1.7, 1601)
    unit = float(CODEBOOK.diff().square().mean()) / 2  # at this temperature the assignment is nearly the identity
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    left.plot(weights, CODEBOOK[nearest(weights, CODEBOOK)], color="black", label="hard: computed with and stored")
    for label, temperature in TEMPERATURES.items():
        master = weights.clone().requires_grad_()
        soft = soft_assignment(master, CODEBOOK, temperature * unit)
        left.plot(weights, soft.detach(), label=f"soft, temperature {label}")
        right.plot(weights, torch.autograd.grad(soft.sum(), master)[0], label=f"soft, temperature {label}")
    right.axhline(1, color="black", label="straight through")
    left.set(xlabel="master weight w", ylabel="weight the network computes with", title="value")
    right.set(xlabel="master weight w", ylabel="slope", title="gradient that reaches the master weight")
    right.set_ylim(-3, 75)  # leaves room for the legend
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
