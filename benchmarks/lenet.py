"""Deep Compression of the paper's LeNet-300-100 and LeNet-5, on Fashion-MNIST instead of MNIST.

    python benchmarks/lenet.py [--seeds 3]

The networks are plain modules, used through the Python interface: they are trained dense, then pruned and trained
further, then clustered and their centres trained. Indices are coded by Huffman, as published, and by the smallest
codec. Sparsity and bits are close to the paper's: 92 % of all weights zero, 6 bits for LeNet-300-100; 8 bits for the
convolutions and 5 for the linear layers of LeNet-5. The size of the paper's gap-coded form is computed from the same
indices. The same dense networks are also trained to a half and to a quarter of the size of that file, for as many
epochs. The tables between the markers of ``README.md`` are rewritten.
"""

from __future__ import annotations

import copy
from typing import Any

import click
import torch
from page import put
from torch import Tensor, nn
from torch.nn import functional

from compressor import Compressor, Policy, Rule
from compressor.data.datasets import Dataset, load_data
from compressor.lifecycle.packed import Packed
from compressor.training.evaluation import evaluate
from compressor.training.loop import train
from compressor.training.optim import make_optimizer

BATCH, DENSE_EPOCHS, PRUNE_EPOCHS, CLUSTER_EPOCHS = 128, 12, 12, 4
LR, PRICED = 1e-3, 3  # weights with a price learn at three times the rate, so the rate is lower by as much
PARTS = 2, 4  # of the size of Deep Compression's smallest file


class Crop(nn.Module):
    """Removes the border of two pixels with which the data set pads its images."""

    def forward(self, images: Tensor) -> Tensor:
        """Returns float[n, 1, 28, 28] of float[n, 1, 32, 32]."""
        return images[:, :, 2:30, 2:30]


def lenet_300_100() -> nn.Sequential:
    """Returns LeNet-300-100: 266,610 parameters."""
    layers = nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    return nn.Sequential(Crop(), nn.Flatten(), *layers)


def lenet_5() -> nn.Sequential:
    """Returns LeNet-5 in Caffe's form, which the paper uses: 431,080 parameters."""
    convolutions = nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2)
    return nn.Sequential(Crop(), *convolutions, nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))


NETWORKS: dict[str, tuple[Any, list[Rule]]] = {
    "LeNet-300-100": (lenet_300_100, [Rule("*", "kmeans", bits=6)]),
    "LeNet-5": (lenet_5, [Rule("*", "kmeans", types=["Linear"], bits=5), Rule("*", "kmeans", bits=8)]),
}
KEPT_LAYERS = [Rule("6", "dense", types=["Linear"], sparsity=0.74, sparsity_by=0.5)]  # the last layer of LeNet-300-100
PRUNED: dict[str, list[Rule]] = {
    "LeNet-300-100": [*KEPT_LAYERS, Rule("*", "dense", sparsity=0.92, sparsity_by=0.5)],
    "LeNet-5": [
        Rule("1", "dense", sparsity=0.34, sparsity_by=0.5),
        Rule("3", "dense", sparsity=0.88, sparsity_by=0.5),
        Rule("8", "dense", sparsity=0.81, sparsity_by=0.5),
        Rule("*", "dense", sparsity=0.92, sparsity_by=0.5),
    ],
}


def task(output: Tensor, target: Tensor, inputs: Tensor) -> Tensor:
    """Returns the cross entropy, the loss of the dense training."""
    del inputs
    return functional.cross_entropy(output, target)


def measure(data: Dataset, name: str, seed: int) -> dict[str, float]:
    """Trains a network dense, prunes and clusters it, and returns accuracies and bytes."""
    torch.manual_seed(seed)
    make, clustered = NETWORKS[name]
    model = make()
    loader, test = data.train_loader(BATCH, seed), data.eval_loader(256, "test")
    parameters = [{"params": list(model.parameters())}]
    optimizer, schedule = make_optimizer(parameters, "adamw", LR, "cosine", DENSE_EPOCHS, len(loader))
    train(model, loader, task, optimizer, schedule, DENSE_EPOCHS)
    dense, teacher = evaluate(model, test), model
    job, packed = stage(model, PRUNED[name], teacher, loader, PRUNE_EPOCHS, False)
    pruned = evaluate(job.model, test)
    job, packed = stage(job.model, clustered, teacher, loader, CLUSTER_EPOCHS, True)
    shared, report, huffman = evaluate(job.model, test), packed.report(), packed.report("huffman")
    lost = int((dense.correct & ~shared.correct).sum())
    gained = int((~dense.correct & shared.correct).sum())
    row: dict[str, float] = {}
    for part in PARTS:
        sized, row[f"bytes, 1/{part}"] = to_size(teacher, report.totals.file // part, loader, seed)
        row[f"top-1, 1/{part}"] = 100 * evaluate(sized, test).top1
    return row | {
        "dense": 100 * dense.top1, "pruned": 100 * pruned.top1, "shared": 100 * shared.top1, "lost": lost,
        "gained": gained, "dense bytes": report.totals.dense, "file": report.totals.file,
        "huffman file": huffman.totals.file, "indices": report.totals.indices,
        "huffman indices": huffman.totals.indices, "gap-coded": report.gap_coded or 0,
    }  # fmt: skip


def stage(
    model: nn.Module, rules: list[Rule], teacher: nn.Module, loader: Any, epochs: int, preserve: bool
) -> tuple[Compressor, Packed]:
    """Trains one stage from the weights of the last one."""
    job = Compressor(model, Policy(rules), teacher=teacher, preserve_sparsity=preserve)
    job.prepare().finetune(loader, epochs=epochs, lr=LR)
    return job, job.finish()


def to_size(teacher: nn.Module, target: int, loader: Any, seed: int) -> tuple[nn.Module, int]:
    """Trains a dense network to a file of at most so many bytes, and returns it and the bytes that the file has."""
    torch.manual_seed(seed)
    images = torch.cat([images for (images, _), _ in zip(loader, range(2), strict=False)])
    job = Compressor(copy.deepcopy(teacher), target_size=target, teacher=teacher, seed=seed)
    job.prepare(calibration=images)
    job.finetune(loader, epochs=PRUNE_EPOCHS + CLUSTER_EPOCHS, lr=LR / PRICED)
    packed = job.finish()
    return job.model, len(packed.to_bytes())


def lines(name: str, rows: list[dict[str, float]]) -> str:
    """Returns a line of the table: means over the seeds."""
    mean = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
    cells = [
        name, str(len(rows)), *(f"{mean[key]:.2f}" for key in ("dense", "pruned", "shared")),
        f"{mean['lost']:,.0f} / {mean['gained']:,.0f}", f"{mean['dense bytes']:,.0f}",
        f"{mean['huffman file']:,.0f} ({mean['dense bytes'] / mean['huffman file']:.1f}x)",
        f"{mean['file']:,.0f} ({mean['dense bytes'] / mean['file']:.1f}x)",
        *(f"{mean[key]:,.0f}" for key in ("gap-coded", "huffman indices", "indices")),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def sized_lines(name: str, rows: list[dict[str, float]]) -> list[str]:
    """Returns the lines of the second table: means over the seeds."""
    made = []
    for part in PARTS:
        size, top1, dense = (
            sum(row[key] for row in rows) / len(rows) for key in (f"bytes, 1/{part}", f"top-1, 1/{part}", "dense bytes")
        )
        made.append(f"| {name} | 1/{part} | {len(rows)} | {size:,.0f} ({dense / size:.1f}x) | {top1:.2f} |")
    return made


HEADERS = (
    "network", "seeds", "dense", "pruned", "shared", "lost / gained", "dense bytes", "file, Huffman", "file, smallest",
    "indices gap-coded", "by Huffman", "by the smallest codec",
)  # fmt: skip


@click.command()
@click.option("--seeds", default=3, help="Runs of each network.")
def main(seeds: int) -> None:
    """Measures both networks, and rewrites the tables."""
    data = load_data("fashion-mnist")
    sized = ["| network | of that file | seeds | trained to a size | top-1 |", "|---|--:|--:|--:|--:|"]
    table = [f"| {' | '.join(HEADERS)} |", "|---|" + "--:|" * (len(HEADERS) - 1)]
    for name in NETWORKS:
        rows = []
        for seed in range(seeds):
            rows.append(measure(data, name, seed))
            print(name, seed, rows[-1], flush=True)
        table.append(lines(name, rows))
        sized += sized_lines(name, rows)
    put("lenet", "\n".join(table))
    put("lenet sized", "\n".join(sized))


if __name__ == "__main__":
    main()
