"""Seconds and memory of each round in which ``wfn`` fixes 25 million weights to one set of values.

    OMP_NUM_THREADS=1 python benchmarks/wfn_clustering.py [--millions 25] [--delta 0.01]

The network has six layers of normally distributed weights with standard deviations from 0.01 to 0.06. Ten rounds run
without training between them: this is all that ``wfn`` adds to a training, except for its term of the loss. Peak memory
is that of the whole process, model and libraries included.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
from torch import nn

from compressor.schemes.wfn import WeightFixing
from compressor.sharing.group import Group
from compressor.sharing.sites import find_tensors


def peak() -> float:
    """Returns the largest resident memory of the process so far, in GB; Linux reports it in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def network(millions: float) -> nn.Module:
    """Returns six square layers of normally distributed weights, each with a larger spread than the one before."""
    torch.manual_seed(0)
    side = round((millions * 1e6 / 6) ** 0.5)
    layers = [nn.Linear(side, side, bias=False) for _ in range(6)]
    for number, layer in enumerate(layers, 1):
        nn.init.normal_(layer.weight, std=0.01 * number)
    return nn.Sequential(*layers)


def main() -> None:
    """Prints one row for each round, and the sums."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--millions", type=float, default=25)
    parser.add_argument("--delta", type=float, default=0.01)
    options = parser.parse_args()
    scheme = WeightFixing(delta=options.delta)
    group = Group(scheme, find_tensors(network(options.millions)))
    scheme.fit(group, None)
    print(f"{group.weights:,} weights, delta {options.delta}; {peak():.2f} GB before\n")
    print("| round | fixed % | values | CPU s | s | peak GB |\n|--:|--:|--:|--:|--:|--:|")
    totals = 0.0, 0.0
    rounds = len(scheme.fractions)
    for number, share in enumerate(scheme.fractions):
        start = time.process_time(), time.perf_counter()
        with torch.no_grad():
            group.on_step(number / (rounds - 1))
        cpu, wall = time.process_time() - start[0], time.perf_counter() - start[1]
        totals = totals[0] + cpu, totals[1] + wall
        values = len(group.codebook())
        print(f"| {number + 1} | {100 * share:.2f} | {values} | {cpu:.1f} | {wall:.1f} | {peak():.2f} |")
    print(f"| all |  | {len(group.codebook())} | {totals[0]:.1f} | {totals[1]:.1f} | {peak():.2f} |")


if __name__ == "__main__":
    main()
