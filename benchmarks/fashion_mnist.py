"""Fashion-MNIST: kmeans and learnt at 2, 3, 4 and 16 codewords against dense; sharing from scratch or afterwards.

    python benchmarks/fashion_mnist.py [--dense FOLDER] [--minutes 10]

Each row is appended to ``results/fashion_mnist.jsonl`` as soon as it is measured and is not measured again, so the
run can be cut into slices. The table between the markers of ``README.md`` is rewritten from all rows. The test images
are used once per row. ``--dense`` names a folder with trained ``MODEL-fashion-mnist.safetensors``; without it the
dense networks are trained first.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import timm
import torch
from page import put
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from compressor import Compressor, Policy, Rule
from compressor.data.datasets import Dataset, load_data
from compressor.lifecycle.packed import Packed
from compressor.models.baseline import train_baseline
from compressor.training.distillation import distillation
from compressor.training.evaluation import evaluate
from compressor.training.loop import train
from compressor.training.optim import make_optimizer

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "fashion_mnist.jsonl"
ARGS: dict[str, Any] = {"num_classes": 10, "in_chans": 1}
BATCH, DISTILL = 128, 0.5
LR = {"test_resnet": 1e-3, "resnet18": 3e-4}  # 1e-3 costs even the dense resnet18 0.4 points
SCRATCH_EPOCHS, SCRATCH_LR = 4, 3e-3


@dataclass(frozen=True)
class Run:
    """One row: network, method, number of codewords (0 for none) and seed."""

    net: str
    method: str
    codewords: int
    seed: int


def runs() -> Iterator[Run]:
    """Yields all rows, those of the small network first."""
    for net, seeds in (("test_resnet", (0, 1, 2)), ("resnet18", (0,))):
        yield Run(net, "dense", 0, 0)
        for seed in seeds:
            yield Run(net, "dense-continued", 0, seed)
            yield from (Run(net, method, k, seed) for k in (4, 2, 16, 3) for method in ("kmeans", "learnt"))
    for seed in (0, 1, 2):
        yield Run("test_resnet", "scratch-dense", 0, seed)
        for method in ("scratch-then-snap", "scratch-then-tune", "scratch-joint"):
            yield Run("test_resnet", method, 4, seed)


class Bench:
    """The data and the dense networks of a benchmark.

    Args:
        dense: the folder of dense weights; None trains the dense networks when they are first needed.
    """

    def __init__(self, dense: Path | None) -> None:
        self.dense_folder = dense
        self.data: Dataset = load_data("fashion-mnist")
        self.dense_correct: dict[str, Tensor] = {}
        self.trained: dict[tuple[int, int], dict[str, Any]] = {}

    def dense(self, net: str) -> nn.Module:
        """Returns the dense network, in eval mode, from the folder or trained here."""
        model = timm.create_model(net, **ARGS)
        if self.dense_folder is not None:
            model.load_state_dict(load_file(self.dense_folder / f"{net}-fashion-mnist.safetensors"))
        else:
            model.load_state_dict(train_baseline(net, ARGS, self.data, seed=0).state)
        return model.eval()

    def measure(self, run: Run) -> dict[str, Any]:
        """Trains, packs and evaluates one row."""
        torch.manual_seed(run.seed)
        start = time.process_time()
        model, packed = (self.from_scratch if run.method.startswith("scratch") else self.from_dense)(run)
        seconds = time.process_time() - start
        result = evaluate(model, self.data.eval_loader(256, "test"))
        row = {
            **asdict(run),
            "top1": result.top1,
            "interval": result.interval,
            "n": result.n,
            "cpu_seconds": round(seconds),
        }
        if run.method == "dense":
            self.dense_correct[run.net] = result.correct
        elif not run.method.startswith("scratch"):
            before = self.dense_correct.setdefault(
                run.net, evaluate(self.dense(run.net), self.data.eval_loader(256, "test")).correct
            )
            row |= {"lost": int((before & ~result.correct).sum()), "gained": int((~before & result.correct).sum())}
        if packed is not None:
            report = packed.report()
            totals = report.totals
            row |= {"coded": totals.indices + totals.codebooks, "file": totals.file, "dense_file": totals.dense}
            row |= {"unique": report.weight_space.unique}
        return row

    def from_dense(self, run: Run) -> tuple[nn.Module, Packed | None]:
        """Fine-tunes the dense network for one epoch with distillation from itself, with or without sharing."""
        model = self.dense(run.net)
        if run.method == "dense":
            return model, None
        loader = self.data.train_loader(BATCH, run.seed)
        if run.method == "dense-continued":
            teacher = self.dense(run.net).requires_grad_(False)

            def loss(output: Tensor, target: Tensor, inputs: Tensor) -> Tensor:
                task = functional.cross_entropy(output, target)
                return (1 - DISTILL) * task + DISTILL * distillation(output, teacher(inputs), 2.0)

            train_dense(model, loader, loss, LR[run.net], 1, run.seed)
            return model, None
        job = Compressor(model, policy(run.method, run.codewords), model_args=ARGS, distill=DISTILL, seed=run.seed)
        job.prepare().finetune(loader, epochs=1, lr=LR[run.net])
        packed = job.finish()
        return job.model, packed

    def from_scratch(self, run: Run) -> tuple[nn.Module, Packed | None]:
        """Trains from random weights for the same number of epochs: shared throughout, or dense first."""
        model = timm.create_model(run.net, **ARGS)
        loader = self.data.train_loader(BATCH, run.seed)

        def loss(output: Tensor, target: Tensor, inputs: Tensor) -> Tensor:
            del inputs
            return functional.cross_entropy(output, target)

        dense_epochs = {"scratch-joint": 0, "scratch-then-tune": SCRATCH_EPOCHS - 1}.get(run.method, SCRATCH_EPOCHS)
        trained = self.trained.get((dense_epochs, run.seed))  # the same dense network serves two rows
        if trained is not None:
            model.load_state_dict(trained)
        elif dense_epochs:
            train_dense(model, loader, loss, SCRATCH_LR, dense_epochs, run.seed)
            self.trained[dense_epochs, run.seed] = copy.deepcopy(model.state_dict())
        if run.method == "scratch-dense":
            return model, None
        scheme = "kmeans" if run.method == "scratch-then-snap" else "learnt"
        job = Compressor(model, policy(scheme, run.codewords), model_args=ARGS, teacher=None, seed=run.seed).prepare()
        if run.method != "scratch-then-snap":
            rate = SCRATCH_LR if run.method == "scratch-joint" else LR[run.net]
            job.finetune(loader, epochs=SCRATCH_EPOCHS - dense_epochs, lr=rate)
        packed = job.finish(calibration=loader if run.method == "scratch-then-snap" else None)
        return job.model, packed


def policy(scheme: str, codewords: int) -> Policy:
    """Returns the policy that shares every Linear and Conv weight, first and last layer included."""
    return Policy([Rule("*", scheme=scheme, codewords=codewords)])


def train_dense(model: nn.Module, loader: Any, loss: Any, lr: float, epochs: int, seed: int) -> None:
    """Trains without sharing, by the optimiser and schedule of the shared rows."""
    torch.manual_seed(seed)
    parameters = [{"params": list(model.parameters()), "weight_decay": 0.0}]
    optimizer, schedule = make_optimizer(parameters, "adamw", lr, "cosine", epochs, len(loader))
    train(model, loader, loss, optimizer, schedule, epochs)


def table(rows: list[dict[str, Any]]) -> str:
    """Returns a Markdown table of the means over the seeds of each row."""
    keys = dict.fromkeys((row["net"], row["method"], row["codewords"]) for row in rows)
    lines = [
        "| network | method | K | seeds | top-1 % (n = 10,000) | 95 % | lost / gained | coded bytes | file bytes "
        "| ratio | unique | CPU s |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for key in sorted(
        keys, key=lambda key: (key[1].startswith("scratch"), key[0] == "resnet18", key[1] != "dense", key[2], key[1])
    ):
        same = [row for row in rows if (row["net"], row["method"], row["codewords"]) == key]
        lines.append(f"| {' | '.join(cells(key, same))} |")
    return "\n".join(lines)


def cells(key: tuple[str, str, int], same: list[dict[str, Any]]) -> list[str]:
    """Returns the cells of one line; the interval is that of the first seed."""

    def mean(name: str, form: str = ",.0f") -> str:
        values = [row[name] for row in same if name in row]
        return format(sum(values) / len(values), form) if values else ""

    top1 = [100 * row["top1"] for row in same]
    low, high = same[0]["interval"]
    flips = f"{mean('lost')} / {mean('gained')}" if "lost" in same[0] else ""
    sizes = [sum(row[name] for row in same) for name in ("dense_file", "file")] if "file" in same[0] else None
    ratio = f"{sizes[0] / sizes[1]:.1f}x" if sizes else ""
    spread = f" ({min(top1):.2f} to {max(top1):.2f})" if len(top1) > 1 else ""
    net, method, codewords = key
    return [
        net, method, str(codewords or ""), str(len(same)), f"{sum(top1) / len(top1):.2f}{spread}",
        f"[{100 * low:.2f}, {100 * high:.2f}]", flips, mean("coded"), mean("file"), ratio, mean("unique"),
        mean("cpu_seconds"),
    ]  # fmt: skip


@click.command()
@click.option("--dense", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder of dense weights.")
@click.option("--minutes", default=float("inf"), help="Start no further row after this many minutes.")
@click.option("--net", help="Only rows of this network.")
@click.option("--codewords", type=int, help="Only rows with this many codewords.")
def main(dense: Path | None, minutes: float, net: str | None, codewords: int | None) -> None:
    """Measures the rows that are missing, and rewrites the table."""
    start, bench = time.perf_counter(), Bench(dense)
    RESULTS.parent.mkdir(exist_ok=True)
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    done = {(row["net"], row["method"], row["codewords"], row["seed"]) for row in rows}
    for run in runs():
        if (run.net, run.method, run.codewords, run.seed) in done or net not in (None, run.net):
            continue
        if codewords not in (None, run.codewords):
            continue
        if time.perf_counter() - start > 60 * minutes:
            print("time is up: call again for the rest")
            break
        rows.append(bench.measure(run))
        with RESULTS.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(rows[-1], flush=True)
    put("fashion_mnist", table(rows))


if __name__ == "__main__":
    main()
