"""Seconds and memory of fixing 25 million weights to one set of values, by round.

    OMP_NUM_THREADS=1 python benchmarks/wfn_clustering.py [--millions 25] [--delta 0.01]

Six layers of normal weights, spread 0.01 to 0.06, and ten rounds with no training in between: all that ``wfn`` adds
to a training run but for its term of the loss. Peak memory is the process's, the model and the libraries included.
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
    """Give the largest resident memory of the process so far, in GB; Linux counts it in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def network(millions: float) -> nn.Module:
    """Six square layers of normal weights, the spread of each larger than of the one before."""
    torch.manual_seed(0)
    side = round((millions * 1e6 / 6) ** 0.5)
    layers = [nn.Linear(side, side, bias=False) for _ in range(6)]
    for number, layer in enumerate(layers, 1):
        nn.init.normal_(layer.weight, std=0.01 * number)
    return nn.Sequential(*layers)


def main() -> None:
    """Print one row a round, and the sums."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--millions", type=float, default=25)
    parser.add_argument("--delta", type=float, default=0.01)
    asked = parser.parse_args()
    scheme = WeightFixing(delta=asked.delta)
    group = Group(scheme, find_tensors(network(asked.millions)))
    scheme.fit(group, None)
    print(f"{group.weights:,} weights, delta {asked.delta}; {peak():.2f} GB before\n")
    print("| round | fixed % | values | CPU s | s | peak GB |\n|--:|--:|--:|--:|--:|--:|")
    spent = 0.0, 0.0
    rounds = len(scheme.fractions)
    for number, share in enumerate(scheme.fractions):
        rng_at_epoch_start = time.process_time(), time.perf_counter()
        with torch.no_grad():
            group.on_step(number / (rounds - 1))
        took = time.process_time() - rng_at_epoch_start[0], time.perf_counter() - rng_at_epoch_start[1]
        spent = spent[0] + took[0], spent[1] + took[1]
        values = len(group.codebook())
        print(
            f"| {number + 1} | {share:.2%} | {values} | {took[0]:.1f} | {took[1]:.1f} | {peak():.2f} |".replace("%", "")
        )
    print(f"| all |  | {len(group.codebook())} | {spent[0]:.1f} | {spent[1]:.1f} | {peak():.2f} |")


if __name__ == "__main__":
    main()
