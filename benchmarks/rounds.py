"""Fashion-MNIST: methods that work in rounds or stages beside learnt, at equal epochs and distillation.

    python benchmarks/rounds.py [--dense FOLDER] [--minutes 10] [--net resnet18] [--seed 0]

Weight Fixing Networks, INQ and Deep Compression, learnt with a codebook per tensor and one for the network, and the
dense network trained on (*dense-continued*). Each row is appended to ``results/rounds.jsonl`` as soon as it is measured
and is not measured again, so the run can be cut into slices; ``README.md`` between the markers is rewritten from all
rows. ``--dense`` is that of ``fashion_mnist.py``.
"""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from fashion_mnist import ARGS, BATCH, DISTILL, LR, Bench, train_dense
from torch import Tensor, nn
from torch.nn import functional

from compressor import Compressor, Policy, Rule
from compressor.losses import distillation
from compressor.packing import Packed
from compressor.training import evaluate

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "rounds.jsonl"
EPOCHS = 2

Stages = list[tuple[list[Rule], int]]
METHODS: dict[str, Stages] = {
    "dense-continued": [],
    **{f"wfn, delta {delta}": [([Rule("*", "wfn", delta=delta)], EPOCHS)] for delta in (0.01, 0.02, 0.05)},
    **{f"inq, {bits} bits": [([Rule("*", "inq", bits=bits)], EPOCHS)] for bits in (5, 4, 3, 2)},
    **{
        f"deep compression, {sparsity:.0%} zeros": [
            ([Rule("*", "dense", sparsity=sparsity, sparsity_by=0.5)], EPOCHS // 2),
            ([Rule("*", "kmeans", types=["Linear"], bits=5), Rule("*", "kmeans", bits=8)], EPOCHS - EPOCHS // 2),
        ]
        for sparsity in (0.8, 0.9, 0.95)
    },
    **{f"learnt, {bits} bits": [([Rule("*", "learnt", bits=bits)], EPOCHS)] for bits in (4, 3, 2)},
    **{
        f"learnt, network, {bits} bits": [([Rule("*", "learnt", bits=bits, group="network")], EPOCHS)]
        for bits in (4, 3, 2)
    },
}


def runs() -> Iterator[tuple[str, str, int]]:
    """List all rows: network, method, seed; each seed of the small network whole, the large one after the first."""
    for net, seed in (("test_resnet", 0), ("resnet18", 0), ("test_resnet", 1), ("test_resnet", 2)):
        yield from ((net, method, seed) for method in METHODS)


def measure(bench: Bench, net: str, method: str, seed: int) -> dict[str, Any]:
    """Train, pack and evaluate one row."""
    torch.manual_seed(seed)
    start = time.process_time()
    model, packed = continued(bench, net, seed) if not METHODS[method] else compressed(bench, net, method, seed)
    seconds = time.process_time() - start
    result = evaluate(model, bench.data.eval_loader(256, "test"))
    if net not in bench.dense_correct:
        bench.dense_correct[net] = evaluate(bench.dense(net), bench.data.eval_loader(256, "test")).correct
    before = bench.dense_correct[net]
    row = {"net": net, "method": method, "seed": seed, "top1": result.top1, "interval": result.interval, "n": result.n}
    row |= {"dense": float(before.float().mean()), "cpu_seconds": round(seconds)}
    row |= {"lost": int((before & ~result.correct).sum()), "gained": int((~before & result.correct).sum())}
    if packed is not None:
        report = packed.report()
        space, totals = report.weight_space, report.totals
        row |= {"coded": totals.indices + totals.codebooks, "file": totals.file, "dense_file": totals.dense}
        row |= {"weights": sum(site.weights for site in report.rows), "gap_coded": report.gap_coded}
        row |= {name: getattr(space, name) for name in ("unique", "entropy", "unique_nonzero", "entropy_nonzero")}
        row |= {"power_terms": space.power_terms}
    return row


def compressed(bench: Bench, net: str, method: str, seed: int) -> tuple[nn.Module, Packed]:
    """Run the stages of a method, each from the weights the one before it left, distilling from the dense network."""
    teacher = bench.dense(net)
    model, pruned = copy.deepcopy(teacher), False
    for rules, epochs in METHODS[method]:
        policy = Policy(rules)
        job = Compressor(
            model, policy, model_args=ARGS, teacher=teacher, distill=DISTILL, seed=seed, preserve_sparsity=pruned
        )
        job.prepare().finetune(bench.data.train_loader(BATCH, seed), epochs=epochs, lr=LR[net])
        packed, model = job.finish(), job.model
        pruned = pruned or any(policy.prunings)
    return model, packed


def continued(bench: Bench, net: str, seed: int) -> tuple[nn.Module, None]:
    """Train the dense network on, distilling from itself."""
    model, teacher = bench.dense(net), bench.dense(net).requires_grad_(False)

    def loss(output: Tensor, target: Tensor, inputs: Tensor) -> Tensor:
        task = functional.cross_entropy(output, target)
        return (1 - DISTILL) * task + DISTILL * distillation(output, teacher(inputs), 2.0)

    train_dense(model, bench.data.train_loader(BATCH, seed), loss, LR[net], EPOCHS, seed)
    return model, None


HEADERS = (
    "network", "method", "seeds", "top-1 % (n = 10,000)", "95 %", "lost / gained", "coded bytes", "bits/weight",
    "file bytes", "ratio", "values", "entropy", "values, entropy without zeros", "powers of two", "gap-coded", "CPU s",
)  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Average the seeds of each row and lay them out as Markdown; intervals are of the first seed."""
    lines = [f"| {' | '.join(HEADERS)} |", "|" + "|".join(["---"] * 2 + ["--:"] * (len(HEADERS) - 2)) + "|"]
    for net in ("test_resnet", "resnet18"):
        for method in METHODS:
            if same := [row for row in rows if (row["net"], row["method"]) == (net, method)]:
                lines.append(f"| {' | '.join([net, method, *cells(same)])} |")
    return "\n".join(lines)


def cells(same: list[dict[str, Any]]) -> list[str]:
    """Give the cells of one line after the names."""

    def mean(name: str, form: str = ",.0f") -> str:
        values = [row[name] for row in same if row.get(name) is not None]
        return format(sum(values) / len(values), form) if values else ""

    top1 = [100 * row["top1"] for row in same]
    spread = f" ({min(top1):.2f} to {max(top1):.2f})" if len(top1) > 1 else ""
    low, high = same[0]["interval"]
    first = same[0]
    packed = "file" in first
    return [
        str(len(same)), f"{sum(top1) / len(top1):.2f}{spread}", f"[{100 * low:.2f}, {100 * high:.2f}]",
        f"{mean('lost')} / {mean('gained')}", mean("coded"),
        f"{8 * first['coded'] / first['weights']:.3f}" if packed else "", mean("file"),
        f"{first['dense_file'] / first['file']:.1f}x" if packed else "", mean("unique"), mean("entropy", ".2f"),
        f"{mean('unique_nonzero')}, {mean('entropy_nonzero', '.2f')}" if packed else "", mean("power_terms", ".2f"),
        mean("gap_coded"), mean("cpu_seconds"),
    ]  # fmt: skip


def write_table(rows: list[dict[str, Any]]) -> None:
    """Put the table between the markers of the README beside this script."""
    page = HERE / "README.md"
    marked = re.compile(r"(<!-- rounds -->\n).*?(<!-- end -->)", re.DOTALL)
    page.write_text(marked.sub(lambda m: m[1] + table(rows) + "\n" + m[2], page.read_text()))


@click.command()
@click.option("--dense", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder of dense weights.")
@click.option("--minutes", default=float("inf"), help="Start no further row after so many minutes.")
@click.option("--net", help="Only rows of this network.")
@click.option("--seed", type=int, help="Only rows of this seed.")
@click.option("--method", help="Only methods that begin so.")
def main(dense: Path | None, minutes: float, net: str | None, seed: int | None, method: str | None) -> None:
    """Measure the rows that are missing, and rewrite the table."""
    start, bench = time.perf_counter(), Bench(dense)
    RESULTS.parent.mkdir(exist_ok=True)
    for run in runs():
        rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
        done = {(row["net"], row["method"], row["seed"]) for row in rows}
        if run in done or net not in (None, run[0]) or seed not in (None, run[2]):
            continue
        if method is not None and not run[1].startswith(method):
            continue
        if time.perf_counter() - start > 60 * minutes:
            print("time is up: call again for the rest")
            break
        row = measure(bench, *run)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)
    write_table([json.loads(line) for line in RESULTS.read_text().splitlines()])


if __name__ == "__main__":
    main()
