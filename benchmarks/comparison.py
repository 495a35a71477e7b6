"""The comparison of methods that ``rounds.py`` and ``schemes.py`` run: equal epochs and distillation in every row.

Each row is appended to ``results/NAME.jsonl`` as soon as it is measured and is not measured again, so a run can be cut
into slices. The table between the markers of that name in ``README.md`` is rewritten from all rows.
"""

from __future__ import annotations

import copy
import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import torch
from fashion_mnist import ARGS, BATCH, DISTILL, LR, Bench, train_dense
from page import put
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from compressor import Compressor, Policy, Rule
from compressor.data.splits import ArraySplit
from compressor.lifecycle.packed import Packed
from compressor.training.distillation import distillation
from compressor.training.evaluation import evaluate

HERE = Path(__file__).parent
Stages = list[tuple[list[Rule], int]]  # rules and epochs of each stage; empty for the dense network trained further


@dataclass(frozen=True)
class Comparison:
    """A benchmark that compares methods under equal conditions.

    Args:
        name: of the results file, and of the markers in ``README.md``.
        methods: the stages of each method, by the name of the method.
        runs: the rows to measure, as (network, method, seed).
        epochs: of each row, over all stages.
        images: how many of the first training images a network is trained on; a network not named uses all.
    """

    name: str
    methods: dict[str, Stages]
    runs: list[tuple[str, str, int]]
    epochs: int
    images: dict[str, int] = field(default_factory=dict)

    def batches(self, bench: Bench, net: str, seed: int) -> DataLoader[Any]:
        """Returns the training batches of a row."""
        train = bench.data.train
        assert isinstance(train, ArraySplit)
        first = copy.copy(train)
        first.images, first.labels = train.images[: self.images.get(net)], train.labels[: self.images.get(net)]
        return replace(bench.data, train=first).train_loader(BATCH, seed)

    def measure(self, bench: Bench, net: str, method: str, seed: int) -> dict[str, Any]:
        """Trains, packs and evaluates one row."""
        torch.manual_seed(seed)
        start = time.process_time()
        model, packed = (
            self.continued(bench, net, seed) if not self.methods[method] else self.compressed(bench, net, method, seed)
        )
        seconds = time.process_time() - start
        result = evaluate(model, bench.data.eval_loader(256, "test"))
        if net not in bench.dense_correct:
            bench.dense_correct[net] = evaluate(bench.dense(net), bench.data.eval_loader(256, "test")).correct
        before = bench.dense_correct[net]
        row: dict[str, Any] = {"net": net, "method": method, "seed": seed}
        row |= {"top1": result.top1, "interval": result.interval, "n": result.n}
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

    def compressed(self, bench: Bench, net: str, method: str, seed: int) -> tuple[nn.Module, Packed]:
        """Runs the stages of a method, each from the weights of the one before, distilling from the dense network."""
        teacher = bench.dense(net)
        model, pruned = copy.deepcopy(teacher), False
        for rules, epochs in self.methods[method]:
            policy = Policy(rules)
            job = Compressor(
                model, policy, model_args=ARGS, teacher=teacher, distill=DISTILL, seed=seed, preserve_sparsity=pruned
            )
            job.prepare().finetune(self.batches(bench, net, seed), epochs=epochs, lr=LR[net])
            packed, model = job.finish(), job.model
            pruned = pruned or any(policy.prunings)
        return model, packed

    def continued(self, bench: Bench, net: str, seed: int) -> tuple[nn.Module, None]:
        """Trains the dense network further, distilling from itself."""
        model, teacher = bench.dense(net), bench.dense(net).requires_grad_(False)

        def loss(output: Tensor, target: Tensor, inputs: Tensor) -> Tensor:
            task = functional.cross_entropy(output, target)
            return (1 - DISTILL) * task + DISTILL * distillation(output, teacher(inputs), 2.0)

        train_dense(model, self.batches(bench, net, seed), loss, LR[net], self.epochs, seed)
        return model, None

    def table(self, rows: list[dict[str, Any]]) -> str:
        """Returns a Markdown table of the means over the seeds; intervals are those of the first seed."""
        lines = [f"| {' | '.join(HEADERS)} |", "|" + "|".join(["---"] * 2 + ["--:"] * (len(HEADERS) - 2)) + "|"]
        for net in ("test_resnet", "resnet18"):
            for method in self.methods:
                if same := [row for row in rows if (row["net"], row["method"]) == (net, method)]:
                    lines.append(f"| {' | '.join([net, method, *cells(same, self.epochs)])} |")
        return "\n".join(lines)

    def command(self) -> click.Command:
        """Returns the command line of the benchmark."""

        @click.command(name=self.name)
        @click.option("--dense", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Dense weights.")
        @click.option("--minutes", default=float("inf"), help="Start no further row after this many minutes.")
        @click.option("--net", help="Only rows of this network.")
        @click.option("--seed", type=int, help="Only rows of this seed.")
        @click.option("--method", help="Only methods whose name begins with this.")
        def main(dense: Path | None, minutes: float, net: str | None, seed: int | None, method: str | None) -> None:
            """Measures the rows that are missing, and rewrites the table."""
            end = time.perf_counter() + 60 * minutes
            wanted = [
                run
                for run in self.runs
                if net in (None, run[0]) and run[1].startswith(method or "") and seed in (None, run[2])
            ]
            self.run(Bench(dense), wanted, end)

        return main

    def run(self, bench: Bench, wanted: list[tuple[str, str, int]], end: float) -> None:
        """Measures the missing rows among those wanted until the time is up, and rewrites the table."""
        results = HERE / "results" / f"{self.name}.jsonl"
        results.parent.mkdir(exist_ok=True)
        results.touch()
        rows = [json.loads(line) for line in results.read_text().splitlines()]
        done = {(row["net"], row["method"], row["seed"]) for row in rows}
        for run in wanted:
            if run in done:
                continue
            if time.perf_counter() > end:
                print("time is up: call again for the rest")
                break
            rows.append(self.measure(bench, *run))
            with results.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(rows[-1], flush=True)
        put(self.name, self.table(rows))


HEADERS = (
    "network", "method", "seeds", "top-1 % (n = 10,000)", "95 %", "lost / gained", "coded bytes", "bits/weight",
    "file bytes", "ratio", "values", "entropy", "values, entropy without zeros", "powers of two", "gap-coded",
    "CPU s per epoch",
)  # fmt: skip


def cells(same: list[dict[str, Any]], epochs: int) -> list[str]:
    """Returns the cells of one line after the names: means of all seeds, and the interval of the first seed."""

    def mean(name: str, form: str = ",.0f") -> str:
        values = [row[name] for row in same if row.get(name) is not None]
        return format(sum(values) / len(values), form) if values else ""

    def total(name: str) -> int:
        return sum(row[name] for row in same)

    top1 = [100 * row["top1"] for row in same]
    spread = f" ({min(top1):.2f} to {max(top1):.2f})" if len(top1) > 1 else ""
    low, high = same[0]["interval"]
    packed = "file" in same[0]
    return [
        str(len(same)), f"{sum(top1) / len(top1):.2f}{spread}", f"[{100 * low:.2f}, {100 * high:.2f}]",
        f"{mean('lost')} / {mean('gained')}", mean("coded"),
        f"{8 * total('coded') / total('weights'):.3f}" if packed else "", mean("file"),
        f"{total('dense_file') / total('file'):.1f}x" if packed else "", mean("unique"), mean("entropy", ".2f"),
        f"{mean('unique_nonzero')}, {mean('entropy_nonzero', '.2f')}" if packed else "", mean("power_terms", ".2f"),
        mean("gap_coded"), f"{sum(row['cpu_seconds'] for row in same) / len(same) / epochs:,.0f}",
    ]  # fmt: skip
