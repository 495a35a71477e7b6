"""Files trained to a size: top-1 on the test images of Fashion-MNIST against all bytes of the file.

    OMP_NUM_THREADS=1 python benchmarks/rate_accuracy.py --dense FOLDER [--minutes 30]

Each network is post-trained to a target and trained on from there, half distilled from its dense weights, with the
price of a bit held until the end; beside it stands the dense network trained further by the same recipe, which more
epochs make better too, and what NNCodec and our post-training make of that. Each row is appended to
``results/rate_accuracy.jsonl`` as soon as it is measured and is not measured again, so the run can be cut into slices.
The tables between the markers of ``README.md`` are rewritten from all rows. Targets and epochs are the same for all
seeds and were not chosen by test images, which are used once a row; top-1 on the last 5,000 training images is beside
it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from fashion_mnist import train_dense
from nncodec_peer import NNCodec
from page import put
from peer_environment import default_folder
from post_training import PRICES, Bench, args, sizes
from rate_curves import mean_ratio
from safetensors.torch import save_file
from slices import measure_missing, rows_of
from torch import Tensor, nn
from torch.nn import functional

from compressor import Compressor
from compressor.formats.errors import UsageError
from compressor.lifecycle.packed import Packed
from compressor.training.distillation import distillation
from compressor.training.evaluation import evaluate

RESULTS = Path(__file__).parent / "results" / "rate_accuracy.jsonl"
BATCH, DISTILL, TEMPERATURE, LR = 64, 0.5, 2.0, 3e-4  # as by default
LEAST = 0.97  # of the dense top-1, where bytes are compared
QPS = range(-32, -10, 2)  # step sizes of NNCodec; 4 more are twice the step
TARGETS = {
    "test_resnet": (24_000, 20_000, 16_000),
    "mobilenetv3_small_050": (45_000, 33_000, 25_000),
    "test_vit": (40_000, 28_000, 20_000),
    "resnet18": (75_000, 45_000),
}
EPOCHS = 6
HEADERS = (
    "network",
    "target",
    "file",
    "times smaller",
    "top-1",
    "[95 %]",
    "dense",
    "validation",
    "after prepare()",
    "CPU s",
)


@dataclass(frozen=True)
class Run:
    """One row: a network, the target in bytes (0: dense, -1: dense trained further), a seed and the epochs."""

    net: str
    target: int
    seed: int
    epochs: int


def runs() -> Iterator[Run]:
    """Yields all rows, the first seed of all networks first."""
    for seed in (0, 1, 2):
        for net, targets in TARGETS.items():
            if seed and net == "resnet18":
                continue
            if not seed:
                yield Run(net, 0, 0, 0)
            for target in (*targets, -1):
                yield Run(net, target, seed, EPOCHS)


def measure(bench: Bench, run: Run) -> dict[str, Any]:
    """Returns one row."""
    torch.manual_seed(run.seed)
    model, validation = bench.dense(run.net), bench.data.eval_loader(256, "validation")
    file, start = bench.weights(run.net).stat().st_size, time.process_time()
    row: dict[str, Any] = {"file": file}
    if run.target > 0:
        model, packed, row = trained(bench, run, model)
        row |= sizes(packed)
    elif run.target < 0:
        continued(bench, run, model)
    row |= {"cpu_seconds": round(time.process_time() - start), "dense_file": file}
    if run.target < 0:
        row |= {"after": compressed(bench, run, model)}
    return row | {"validation": evaluate(model, validation).top1} | bench.test(model)


def reached(bench: Bench, run: Run) -> dict[str, Any] | None:
    """Returns one row; None where its target is out of reach."""
    try:
        return measure(bench, run)
    except UsageError as exc:  # less than names, norms and biases take
        print(f"{run}: {exc}")
        return None


def trained(bench: Bench, run: Run, model: nn.Module) -> tuple[nn.Module, Packed, dict[str, Any]]:
    """Returns a network that was trained to a target, packed, and what happened on the way."""
    job = Compressor(model, target_size=run.target, model_args=args(run.net), distill=DISTILL, seed=run.seed)
    job.prepare(calibration=bench.images(run.seed))
    assert job.search is not None
    validation, history = bench.data.eval_loader(256, "validation"), []

    def note(epoch: Any, top1: float | None) -> None:
        sharing = epoch.sharing
        history.append({"top1": top1, "size": sharing.size, "price": sharing.price, "changed": sharing.changed})
        print(run, history[-1], flush=True)

    before = {"prepared": evaluate(job.model, validation).top1, "prepared_size": job.search.size}
    loader = bench.data.train_loader(BATCH, run.seed)
    job.finetune(loader, validation, epochs=run.epochs, lr=LR, distill=DISTILL, on_epoch=note)
    packed = job.finish(half_untouched=True)
    return job.model, packed, {**before, "rate": job.search.rate, "history": history}


def continued(bench: Bench, run: Run, model: nn.Module) -> None:
    """Trains the dense network further, distilling from itself, by the same recipe."""
    teacher = bench.dense(run.net).requires_grad_(False)

    def loss(output: Tensor, target: Tensor, inputs: Tensor) -> Tensor:
        task = functional.cross_entropy(output, target)
        return (1 - DISTILL) * task + DISTILL * distillation(output, teacher(inputs), TEMPERATURE)

    train_dense(model, bench.data.train_loader(BATCH, run.seed), loss, LR, run.epochs, run.seed)


def compressed(bench: Bench, run: Run, model: nn.Module) -> dict[str, list[tuple[int, float]]]:
    """Returns bytes and top-1 of files that are made of a trained network without further training, by method."""
    weights = Path(bench.scratch.name) / f"{run.net}-trained-{run.seed}.safetensors"
    save_file(model.state_dict(), weights)
    curves: dict[str, list[tuple[int, float]]] = {"NNCodec": [], "post-training": []}
    for qp in QPS:
        coded, decoded = bench.peer.coded(run.net, args(run.net), weights, qp, list(QPS), []), copy.deepcopy(model)
        decoded.load_state_dict(model.state_dict() | coded.state)
        curves["NNCodec"].append((coded.size, bench.test(decoded)["top1"]))
    for price in PRICES[run.net]:
        job = Compressor(model, rate=price, model_args=args(run.net), teacher=None)
        packed = job.prepare(calibration=bench.images(run.seed)).finish(half_untouched=True, fold_norms=True)
        curves["post-training"].append((len(packed.to_bytes()), bench.test(job.model)["top1"]))
    return curves


def ratios(rows: list[dict[str, Any]]) -> str:
    """Returns a table of our bytes over those of the same training and compression after it, at equal top-1."""
    lines = ["| network | seed | bytes / NNCodec's after training | bytes / post-training's after training |"]
    lines.append("|---|--:|--:|--:|")
    dense = {row["net"]: row["top1"] for row in rows if row["target"] == 0}
    for row in (row for row in rows if row["target"] < 0 and "after" in row):
        same = [one for one in rows if (one["net"], one["seed"]) == (row["net"], row["seed"]) and one["target"] > 0]
        ours, least = [(one["file"], one["top1"]) for one in same], LEAST * dense[row["net"]]
        found = [mean_ratio(ours, curve, least) if ours else None for curve in row["after"].values()]
        cells = [row["net"], f"{row['seed']}", *("" if one is None else f"{one:.3f}" for one in found)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    """Returns a Markdown table of all rows."""
    lines = [f"| {' | '.join(HEADERS)} |", "|---|" + "--:|" * (len(HEADERS) - 1)]
    dense = {row["net"]: row["top1"] for row in rows if row["target"] == 0}
    for row in sorted(rows, key=lambda row: (list(TARGETS).index(row["net"]), row["target"] < 0, -row["target"])):
        kind = {0: "dense", -1: "dense, trained on"}.get(row["target"], f"{row['target']:,}")
        kind += "" if row["seed"] == 0 else f", seed {row['seed']}"
        low, high = row["interval"]
        before = f"{100 * row['prepared']:.2f}" if "prepared" in row else ""
        cells = [row["net"], kind, f"{row['file']:,}", f"{row['dense_file'] / row['file']:.0f}"]
        cells += [f"{100 * row['top1']:.2f}", f"{100 * low:.1f}-{100 * high:.1f}", f"{100 * dense[row['net']]:.2f}"]
        cells += [f"{100 * row['validation']:.2f}", before, f"{row['cpu_seconds']}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command()
@click.option("--dense", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder of dense weights.")
@click.option("--minutes", default=float("inf"), help="Start no further row after this many minutes.")
@click.option("--net", type=click.Choice(list(TARGETS)), help="Only rows of this network.")
@click.option("--target", type=int, help="Only this target, beside the dense rows.")
@click.option("--seed", type=int, help="Only rows of this seed.")
def main(dense: Path | None, minutes: float, net: str | None, target: int | None, seed: int | None) -> None:
    """Measures the rows that are missing, and rewrites the table."""
    torch.set_num_threads(1)
    bench = Bench(dense, NNCodec(default_folder(), keep=True))

    def is_wanted(run: Run) -> bool:
        chosen = net in (None, run.net) and seed in (None, run.seed) and target in (None, run.target)
        return chosen or not run.target  # whose top-1 the table has beside all others

    measure_missing(filter(is_wanted, runs()), RESULTS, minutes, lambda run: reached(bench, run))
    rows = rows_of(RESULTS)
    put("rate_accuracy", table(rows))
    put("rate_accuracy ratios", ratios(rows))


if __name__ == "__main__":
    main()
