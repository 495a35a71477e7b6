"""A small student alone, under a bigger teacher, and under it with shared weights: quantised distillation.

    OMP_NUM_THREADS=1 python benchmarks/distilled_students.py [--dense FOLDER] [--minutes 10] [--seed 0]

The comparison of Polino, Pascanu and Alistarh on the first images of Fashion-MNIST, many or few: a narrow LeNet
trained on labels or distilled from a dense ``resnet18``, then trained on for the same epochs dense, under ``uniform``
(with the teacher: quantised distillation) and under ``diffquant``. Each row is appended to
``results/distilled_students.jsonl`` as soon as it is measured and is not measured again; ``README.md`` between the
markers is rewritten from all rows. ``--dense`` is that of ``fashion_mnist.py``; the teacher has seen all 55,000
training images.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from fashion_mnist import Bench, train_dense
from lenet import Crop
from page import put
from torch import Tensor, nn
from torch.nn import functional

from compressor import Compressor, Policy, Rule
from compressor.data.splits import ArraySplit
from compressor.lifecycle.packed import Packed
from compressor.training.distillation import distillation
from compressor.training.evaluation import evaluate

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "distilled_students.jsonl"
TEACHER = "resnet18"
BATCH, DISTILL, TEMPERATURE = 128, 0.7, 2.0  # the paper's weight and temperature
EPOCHS = {20_000: (10, 4), 4_000: (30, 10)}  # of images to train on: before and after the students part
LR, MORE_LR = 3e-3, 1e-3


@dataclass(frozen=True)
class Run:
    """One row: training images, whether there is a teacher, the scheme ("" for none), its bits and the seed."""

    images: int
    taught: bool
    scheme: str
    bits: int
    seed: int


def runs() -> Iterator[Run]:
    """List all rows, seed by seed."""
    for images, seed in ((4_000, 0), (4_000, 1), (4_000, 2), (20_000, 0), (20_000, 1), (20_000, 2)):
        for taught in (False, True):
            yield Run(images, taught, "", 0, seed)
            yield from (Run(images, taught, "uniform", bits, seed) for bits in (4, 2))
        yield from (Run(images, True, "diffquant", bits, seed) for bits in (4, 2))


def student(seed: int) -> nn.Sequential:
    """LeNet-5 with 12, 24 and 64 channels: 32,826 parameters."""
    torch.manual_seed(seed)
    convolutions = nn.Conv2d(1, 12, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(12, 24, 5), nn.MaxPool2d(2), nn.ReLU()
    return nn.Sequential(Crop(), *convolutions, nn.Flatten(), nn.Linear(384, 64), nn.ReLU(), nn.Linear(64, 10))


class Remembering(nn.Module):
    """A teacher that is asked once about each training image, for images that are not augmented come again as they are.

    Args:
        teacher: asked about any other image in the usual way.
        batches: (images, labels) of all training images.
    """

    def __init__(self, teacher: nn.Module, batches: Any) -> None:
        super().__init__()
        self.teacher = teacher.eval().requires_grad_(False)
        self.factors = torch.randint(1 << 62, (1024,), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            known = [(self.keys(images), self.teacher(images)) for images, _ in batches]
        self.known, order = torch.cat([keys for keys, _ in known]).sort()
        self.logits = torch.cat([logits for _, logits in known])[order]

    def keys(self, images: Tensor) -> Tensor:
        """Give a number for each image, int64[n], from all bits of its pixels."""
        return (images.flatten(1).view(torch.int32).long() * self.factors).sum(1)

    def forward(self, images: Tensor) -> Tensor:
        """Give the logits, float32[n, 10]."""
        keys = self.keys(images)
        places = torch.searchsorted(self.known, keys).clamp(max=len(self.known) - 1)
        if not torch.equal(self.known[places], keys):
            logits: Tensor = self.teacher(images)
            return logits
        return self.logits[places]


class Students:
    """The first training images without augmentation, the teacher, and the students that the rows go on from."""

    def __init__(self, dense: Path | None, images: int) -> None:
        bench = Bench(dense)
        split = bench.data.train
        assert isinstance(split, ArraySplit)
        first = split.images[:images], split.labels[:images]
        plain = ArraySplit(*first, mean=split.mean, std=split.std, pad=split.pad)
        self.data, self.epochs = replace(bench.data, train=plain), EPOCHS[images]
        self.teacher = Remembering(bench.dense(TEACHER), self.data.eval_loader(250, "train"))
        self.trained: dict[tuple[bool, int], nn.Module] = {}

    def start(self, taught: bool, seed: int) -> nn.Module:
        """Give a copy of the dense student after the first epochs."""
        if (taught, seed) not in self.trained:
            model = student(seed)
            train_dense(model, self.data.train_loader(BATCH, seed), self.loss(taught), LR, self.epochs[0], seed)
            self.trained[taught, seed] = model
        return copy.deepcopy(self.trained[taught, seed])

    def loss(self, taught: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Give the loss on labels alone, or that of Compressor with a teacher."""

        def loss(output: Tensor, target: Tensor, inputs: Tensor) -> Tensor:
            task = functional.cross_entropy(output, target)
            if not taught:
                return task
            return (1 - DISTILL) * task + DISTILL * distillation(output, self.teacher(inputs), TEMPERATURE)

        return loss

    def finish(self, run: Run) -> tuple[nn.Module, Packed | None]:
        """Train on, dense or with shared weights."""
        model, loader = self.start(run.taught, run.seed), self.data.train_loader(BATCH, 100 + run.seed)
        if not run.scheme:
            train_dense(model, loader, self.loss(run.taught), MORE_LR, self.epochs[1], run.seed)
            return model, None
        job = Compressor(
            model, Policy([Rule("*", run.scheme, bits=run.bits)]), teacher=self.teacher if run.taught else None,
            distill=DISTILL, temperature=TEMPERATURE, seed=run.seed,
        )  # fmt: skip
        job.prepare().finetune(loader, epochs=self.epochs[1], lr=MORE_LR)
        packed = job.finish()
        return job.model, packed

    def measure(self, run: Run) -> dict[str, Any]:
        """Train, pack and evaluate one row; the first of its kind pays for the epochs it shares with others."""
        start = time.process_time()
        model, packed = self.finish(run)
        seconds = time.process_time() - start
        result = evaluate(model, self.data.eval_loader(256, "test"))
        row = {**asdict(run), "top1": result.top1, "interval": result.interval, "n": result.n}
        row |= {"validation": evaluate(model, self.data.eval_loader(256, "validation")).top1}
        if packed is not None:
            report = packed.report()
            totals, weights = report.totals, sum(site.weights for site in report.rows)
            row |= {"coded": totals.indices + totals.codebooks, "weights": weights, "file": totals.file}
            row |= {"dense_file": totals.dense}
        return row | {"cpu_seconds": round(seconds)}


HEADERS = (
    "images", "student", "bits", "seeds", "on labels: top-1 % (n = 10,000)", "95 %", "with the teacher: top-1 %",
    "95 %", "coded bytes", "bits/weight", "file bytes",
)  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Average the seeds, and set the students on labels beside those with the teacher."""
    lines = [f"| {' | '.join(HEADERS)} |", "|--:|---|" + "--:|" * (len(HEADERS) - 2)]
    for images, scheme, bits in dict.fromkeys((run.images, run.scheme, run.bits) for run in runs()):
        same = [row for row in rows if (row["images"], row["scheme"], row["bits"]) == (images, scheme, bits)]
        if not same:
            continue
        alone, taught = ([row for row in same if row["taught"] == with_it] for with_it in (False, True))
        cells = [f"{images:,}", scheme or "dense", str(bits or ""), f"{len(alone)}, {len(taught)}"]
        cells += [*top1(alone), *top1(taught)]
        if scheme:
            coded, weights, file = (sum(row[key] for row in same) / len(same) for key in ("coded", "weights", "file"))
            cells += [f"{coded:,.0f}", f"{8 * coded / weights:.2f}", f"{file:,.0f}"]
        lines.append(f"| {' | '.join(cells + [''] * (len(HEADERS) - len(cells)))} |")
    return "\n".join(lines)


def top1(rows: list[dict[str, Any]]) -> list[str]:
    """Give the mean with the spread over the seeds, and the interval of the first."""
    if not rows:
        return ["", ""]
    found = [100 * row["top1"] for row in rows]
    low, high = rows[0]["interval"]
    spread = f" ({min(found):.2f} to {max(found):.2f})" if len(found) > 1 else ""
    return [f"{sum(found) / len(found):.2f}{spread}", f"[{100 * low:.2f}, {100 * high:.2f}]"]


@click.command()
@click.option("--dense", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder of dense weights.")
@click.option("--minutes", default=float("inf"), help="Start no further row after so many minutes.")
@click.option("--images", type=int, help="Only rows of so many training images.")
@click.option("--seed", type=int, help="Only rows of this seed.")
def main(dense: Path | None, minutes: float, images: int | None, seed: int | None) -> None:
    """Measure the rows that are missing, and rewrite the table."""
    start = time.perf_counter()
    RESULTS.parent.mkdir(exist_ok=True)
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    done = [Run(**{name: row[name] for name in Run.__dataclass_fields__}) for row in rows]
    students: dict[int, Students] = {}
    for run in runs():
        if run in done or images not in (None, run.images) or seed not in (None, run.seed):
            continue
        if time.perf_counter() - start > 60 * minutes:
            print("time is up: call again for the rest")
            break
        if run.images not in students:
            students[run.images] = Students(dense, run.images)
        rows.append(students[run.images].measure(run))
        with RESULTS.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(rows[-1], flush=True)
    put("distilled_students", table([json.loads(line) for line in RESULTS.read_text().splitlines()]))


if __name__ == "__main__":
    main()
