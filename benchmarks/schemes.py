"""Fashion-MNIST: every scheme at about 2, 3 and 4 bits where it supports them, at one epoch and equal distillation.

    python benchmarks/schemes.py [--dense FOLDER] [--minutes 10] [--net resnet18] [--seed 0]

Rows, results and table are those of ``comparison.py``; ``--dense`` is that of ``fashion_mnist.py``. The large network
takes ten times as long per image, so it is trained only at the lowest setting of each scheme, on 15,000 images.
"""

from __future__ import annotations

from typing import Any

from comparison import Comparison, Stages

from compressor import Rule

EPOCHS = 1
SETTINGS: dict[str, list[dict[str, Any]]] = {
    **{scheme: [{"bits": bits} for bits in (4, 3, 2)] for scheme in ("learnt", "kmeans", "uniform", "diffquant")},
    "fixed": [{"bits": bits} for bits in (4, 3)],
    "hashed": [{"bits": bits} for bits in (4, 2)],
    "wfn": [{"delta": delta} for delta in (0.005, 0.01)],
    "inq": [{"bits": bits} for bits in (5, 4)],
    "ttq": [{}],
}


def row_name(scheme: str, settings: dict[str, Any]) -> str:
    """Returns the name of a row, such as "learnt, 4 bits"."""
    described = (f"{value} bits" if key == "bits" else f"{key} {value}" for key, value in settings.items())
    return ", ".join([scheme, *described])


METHODS: dict[str, Stages] = {
    "dense-continued": [],
    **{
        row_name(scheme, settings): [([Rule("*", scheme, **settings)], EPOCHS)]
        for scheme, grid in SETTINGS.items()
        for settings in grid
    },
}
LOWEST = ["dense-continued", *(row_name(scheme, grid[-1]) for scheme, grid in SETTINGS.items())]
RUNS = [("test_resnet", method, 0) for method in METHODS]
RUNS += [("resnet18", method, 0) for method in LOWEST]
RUNS += [("test_resnet", method, seed) for seed in (1, 2) for method in METHODS]

if __name__ == "__main__":
    Comparison("schemes", METHODS, RUNS, EPOCHS, {"resnet18": 15_000}).command()()
