"""How many values a weight may have, from 2 to 256, against top-1 and file bytes, for every scheme.

    OMP_NUM_THREADS=1 python benchmarks/allowed_weights.py --dense FOLDER [--minutes 30] [--net test_resnet]

``test_resnet`` is trained for one epoch, half distilled from the dense network, as in ``schemes.py``; ``resnet18`` is
post-trained with 256 images and not trained. Every Linear and Conv weight is shared, and what is not is stored in
float16. Each row is appended to ``results/allowed_weights.jsonl`` as soon as it is measured and is not measured again,
so the run can be cut into slices; ``results_page.py`` makes the pages of the rows. The test images are used once a row.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import timm
import torch
from fashion_mnist import BATCH, DISTILL, LR
from nncodec_peer import NNCodec
from peer_environment import default_folder
from post_training import Bench, args, sizes
from torch import nn

from compressor import Compressor, Policy, Rule
from compressor.lifecycle.packed import Packed
from compressor.training.evaluation import evaluate

RESULTS = Path(__file__).parent / "results" / "allowed_weights.jsonl"
EPOCHS = {"test_resnet": 1, "resnet18": 0}
ALLOWED = (4, 16, 2, 256, 8, 3, 64, 32)  # the rows of the first ones come first
BITS = (2, 4, 1, 8, 3, 6, 5)
DELTAS = (0.02, 0.01, 0.05, 0.005)
PRICED = 3  # times the learning rate is what shared weights learn at where a bit has a price: so all learn alike
PRICES = {"test_resnet": (4e-7, 1e-7, 2.5e-8, 1.6e-6), "resnet18": (1.6e-8, 4e-9, 1e-9, 1e-7)}


@dataclass(frozen=True)
class Run:
    """One row.

    Args:
        net: the network.
        series: the curve it belongs to, one a scheme, two of ``learnt``.
        allowed: how many values a tensor may have; None where that is an outcome.
        settings: of the rule, its scheme among them.
        seed: of everything random.
    """

    net: str
    series: str
    allowed: int | None
    settings: dict[str, Any]
    seed: int = 0

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What tells rows apart."""
        return self.net, self.series, json.dumps(self.settings, sort_keys=True), self.seed


def series(net: str) -> dict[str, list[tuple[int | None, dict[str, Any]]]]:
    """Returns the allowed numbers and settings of every curve of a network.

    A scheme has the numbers that its values can be: ``uniform`` and ``fixed`` powers of two, ``inq`` one more than
    half of them, ``ttq`` three; ``hashed`` has each value with either sign. Of ``wfn``, and of ``learnt`` with a price,
    the number is an outcome.
    """
    free: dict[str, list[tuple[int | None, dict[str, Any]]]] = {
        "learnt": [(k, {"scheme": "learnt", "codewords": k}) for k in ALLOWED],
        "kmeans": [(k, {"scheme": "kmeans", "codewords": k}) for k in ALLOWED],
        "diffquant": [(k, {"scheme": "diffquant", "codewords": k}) for k in ALLOWED],
        "learnt, one codebook": [(k, {"scheme": "learnt", "group": "network", "codewords": k}) for k in ALLOWED],
        "uniform": [(2**bits, {"scheme": "uniform", "bits": bits}) for bits in BITS],
        "fixed": [(2**bits, {"scheme": "fixed", "bits": bits}) for bits in BITS if bits > 1],
        "inq": [(2 ** (bits - 1) + 1, {"scheme": "inq", "bits": bits}) for bits in BITS if bits > 1],
        "ttq": [(3, {"scheme": "ttq"})],
        "hashed": [(2 * k, {"scheme": "hashed", "codewords": k}) for k in (8, 128, 32)],
        "wfn": [(None, {"scheme": "wfn", "delta": delta}) for delta in DELTAS],
        "learnt, price": [(None, {"scheme": "learnt", "rate": price}) for price in PRICES[net]],
    }
    if EPOCHS[net]:
        return free
    # Without training ``learnt`` is ``kmeans``; the others have to be trained to be what their papers describe.
    return {name: free[name] for name in ("kmeans", "learnt, one codebook", "uniform", "fixed", "inq", "learnt, price")}


def runs(net: str) -> Iterator[Run]:
    """Yields the rows of a network, one of each curve, then the next of each."""
    curves = series(net)
    for place in range(max(map(len, curves.values()))):
        for name, points in curves.items():
            if place < len(points):
                yield Run(net, name, *points[place])


def measure(bench: Bench, run: Run) -> dict[str, Any]:
    """Compresses a network as a row says, and returns its figures."""
    torch.manual_seed(run.seed)
    start = time.process_time()
    model, packed = compressed(bench, run)
    seconds = time.process_time() - start
    report = packed.report()
    row: dict[str, Any] = {"net": run.net, "series": run.series, "allowed": run.allowed, "settings": run.settings}
    row |= {"seed": run.seed, "epochs": EPOCHS[run.net], **sizes(packed)}
    row |= {"used": max(site.used for site in report.rows), "unique": report.weight_space.unique}
    row |= {"cpu_seconds": round(seconds), "dense_file": bench.weights(run.net).stat().st_size}
    row |= {"validation": evaluate(model, bench.data.eval_loader(256, "validation")).top1}
    return row | bench.test(model)


def compressed(bench: Bench, run: Run) -> tuple[nn.Module, Packed]:
    """Returns a network of few values, trained if its rows are, and packed."""
    dense = bench.dense(run.net)
    hashed, priced = run.settings["scheme"] == "hashed", "rate" in run.settings
    model = timm.create_model(run.net, **args(run.net)) if hashed else dense  # random sharing keeps little of weights
    job = Compressor(
        model, Policy([Rule("*", **run.settings)]), model_args=args(run.net), seed=run.seed, from_scratch=hashed,
        teacher=dense if EPOCHS[run.net] else None, distill=DISTILL,
    )  # fmt: skip
    job.prepare(calibration=bench.images(run.seed) if priced or not EPOCHS[run.net] else None)
    if epochs := EPOCHS[run.net]:
        job.finetune(
            bench.data.train_loader(BATCH, run.seed), epochs=epochs, lr=LR[run.net] / (PRICED if priced else 1)
        )
    packed = job.finish(half_untouched=True, fold_norms=priced)
    return job.model, packed


@click.command()
@click.option("--dense", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder of dense weights.")
@click.option("--minutes", default=float("inf"), help="Start no further row after this many minutes.")
@click.option("--net", type=click.Choice(list(EPOCHS)), multiple=True, default=tuple(EPOCHS), help="Networks.")
@click.option("--series", "only", help="Only this curve.")
@click.option("--rows", default=1000, help="Measure at most so many rows.")
def main(dense: Path | None, minutes: float, net: tuple[str, ...], only: str | None, rows: int) -> None:
    """Measures the rows that are missing."""
    torch.set_num_threads(1)
    bench, end = Bench(dense, NNCodec(default_folder(), keep=True)), time.perf_counter() + 60 * minutes
    RESULTS.touch()
    done = {
        (row["net"], row["series"], json.dumps(row["settings"], sort_keys=True), row["seed"])
        for row in map(json.loads, RESULTS.read_text().splitlines())
    }
    missing = [run for name in net for run in runs(name) if run.key not in done and only in (None, run.series)]
    for run in missing[:rows]:
        if time.perf_counter() > end:
            print("time is up: call again for the rest")
            break
        row = measure(bench, run)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


if __name__ == "__main__":
    main()
