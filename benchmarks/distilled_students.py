"""Quantised distillation: a small student trained alone, from a bigger teacher, and from it with shared weights.

    OMP_NUM_THREADS=1 python benchmarks/distilled_students.py [--dense FOLDER] [--minutes 10] [--seed 0]

The comparison of Polino, Pascanu and Alistarh, "Model compression via distillation and quantization" (2018), on the
first 4,000 or 20,000 images of Fashion-MNIST. A narrow LeNet is trained on labels or distilled from a dense
``resnet18``, then trained for the same number of further epochs: dense, with ``uniform`` (with the teacher: quantised
distillation) or with ``diffquant``. Each row is appended to ``results/distilled_students.jsonl`` as soon as it is
measured and is not measured again; the table between the markers of ``README.md`` is rewritten from all rows.
``--dense`` is that of ``fashion_mnist.py``. The teacher was trained on all 55,000 training images.
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
BATCH, DISTILL, TEMPERATURE = 128, 0.7, 2.0  # weight and temperature of the distillation are the paper's
EPOCHS = {20_000: (10, 4), 4_000: (30, 10)}  # by number of images: epochs of the common start, and of each row after it
LR, MORE_LR = 3e-3, 1e-3


@dataclass(frozen=True)
class Run:
    """One row: training images, whether there is a teacher, the scheme ("" for dense), its bits and the seed."""

    images: int
    distilled: bool
    scheme: str
    bits: int
    seed: int


def runs() -> Iterator[Run]:
    """Yields all rows, seed by seed."""
    for images, seed in ((4_000, 0), (4_000, 1), (4_000, 2), (20_000, 0), (20_000, 1), (20_000, 2)):
        for distilled in (False, True):
            yield Run(images, distilled, "", 0, seed)
            yield from (Run(images, distilled, "uniform", bits, seed) for bits in (4, 2))
        yield from (Run(images, True, "diffquant", bits, seed) for bits in (4, 2))


def student(seed: int) -> nn.Sequential:
    """Returns a LeNet-5 with 12, 24 and 64 channels: 32,826 parameters."""
    torch.manual_seed(seed)
    convolutions = nn.Conv2d(1, 12, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(12, 24, 5), nn.MaxPool2d(2), nn.ReLU()
    return nn.Sequential(Crop(), *convolutions, nn.Flatten(), nn.Linear(384, 64), nn.ReLU(), nn.Linear(64, 10))


class CachedTeacher(nn.Module):
    """A teacher whose logits for the training images are computed once: images without augmentation do not change.

    Args:
        teacher: the network; it is run for any batch that has an image outside the training images.
        batches: (images, labels) of all training images.
    """

    def __init__(self, teacher: nn.Module, batches: Any) -> None:
        super().__init__()
        self.teacher = teacher.eval().requires_grad_(False)
        self.factors = torch.randint(1 << 62, (1024,), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            cached = [(self.keys(images), self.teacher(images)) for images, _ in batches]
        self.cached_keys, order = torch.cat([keys for keys, _ in cached]).sort()
        self.cached_logits = torch.cat([logits for _, logits in cached])[order]

    def keys(self, images: Tensor) -> Tensor:
        """Returns a number for each image, int64[n], computed from all bits of its pixels."""
        return (images.flatten(1).view(torch.int32).long() * self.factors).sum(1)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits, float32[n, 10]."""
        keys = self.keys(images)
        positions = torch.searchsorted(self.cached_keys, keys).clamp(max=len(self.cached_keys) - 1)
        if not torch.equal(self.cached_keys[positions], keys):
            logits: Tensor = self.teacher(images)
            return logits
        return self.cached_logits[positions]


class Students:
    """The first training images without augmentation, the teacher, and the students from which the rows start.

    Args:
        dense: the folder of dense weights; None trains the teacher first.
        images: how many of the first training images are used.
    """

    def __init__(self, dense: Path | None, images: int) -> None:
        bench = Bench(dense)
        split = bench.data.train
        assert isinstance(split, ArraySplit)
        first = split.images[:images], split.labels[:images]
        plain = ArraySplit(*first, mean=split.mean, std=split.std, pad=split.pad)
        self.data, self.epochs = replace(bench.data, train=plain), EPOCHS[images]
        self.teacher = CachedTeacher(bench.dense(TEACHER), self.data.eval_loader(250, "train"))
        self.trained: dict[tuple[bool, int], nn.Module] = {}

    def start(self, distilled: bool, seed: int) -> nn.Module:
        """Returns a copy of the dense student after the common first epochs."""
        if (distilled, seed) not in self.trained:
            model = student(seed)
            train_dense(model, self.data.train_loader(BATCH, seed), self.loss(distilled), LR, self.epochs[0], seed)
            self.trained[distilled, seed] = model
        return copy.deepcopy(self.trained[distilled, seed])

    def loss(self, distilled: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Returns the loss on labels alone, or the loss of Compressor with a teacher."""

        def loss(output: Tensor, target: Tensor, inputs: Tensor) -> Tensor:
            task = functional.cross_entropy(output, target)
            if not distilled:
                return task
            return (1 - DISTILL) * task + DISTILL * distillation(output, self.teacher(inputs), TEMPERATURE)

        return loss

    def finish(self, run: Run) -> tuple[nn.Module, Packed | None]:
        """Trains the student of a row further, dense or with shared weights."""
        model, loader = self.start(run.distilled, run.seed), self.data.train_loader(BATCH, 100 + run.seed)
        if not run.scheme:
            train_dense(model, loader, self.loss(run.distilled), MORE_LR, self.epochs[1], run.seed)
            return model, None
        job = Compressor(
            model, Policy([Rule("*", run.scheme, bits=run.bits)]), teacher=self.teacher if run.distilled else None,
            distill=DISTILL, temperature=TEMPERATURE, seed=run.seed,
        )  # fmt: skip
        job.prepare().finetune(loader, epochs=self.epochs[1], lr=MORE_LR)
        packed = job.finish()
        return job.model, packed

    def measure(self, run: Run) -> dict[str, Any]:
        """Trains, packs and evaluates one row; the first row of a common start includes its CPU seconds."""
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
    """Returns a Markdown table of the means over the seeds, students on labels beside those with the teacher."""
    lines = [f"| {' | '.join(HEADERS)} |", "|--:|---|" + "--:|" * (len(HEADERS) - 2)]
    for images, scheme, bits in dict.fromkeys((run.images, run.scheme, run.bits) for run in runs()):
        same = [row for row in rows if (row["images"], row["scheme"], row["bits"]) == (images, scheme, bits)]
        if not same:
            continue
        alone, distilled = ([row for row in same if row["distilled"] == teacher] for teacher in (False, True))
        cells = [f"{images:,}", scheme or "dense", str(bits or ""), f"{len(alone)}, {len(distilled)}"]
        cells += [*top1(alone), *top1(distilled)]
        if scheme:
            coded, weights, file = (sum(row[key] for row in same) / len(same) for key in ("coded", "weights", "file"))
            cells += [f"{coded:,.0f}", f"{8 * coded / weights:.2f}", f"{file:,.0f}"]
        lines.append(f"| {' | '.join(cells + [''] * (len(HEADERS) - len(cells)))} |")
    return "\n".join(lines)


def top1(rows: list[dict[str, Any]]) -> list[str]:
    """Returns the mean with its range over the seeds, and the interval of the first seed."""
    if not rows:
        return ["", ""]
    percent = [100 * row["top1"] for row in rows]
    low, high = rows[0]["interval"]
    spread = f" ({min(percent):.2f} to {max(percent):.2f})" if len(percent) > 1 else ""
    return [f"{sum(percent) / len(percent):.2f}{spread}", f"[{100 * low:.2f}, {100 * high:.2f}]"]


@click.command()
@click.option("--dense", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder of dense weights.")
@click.option("--minutes", default=float("inf"), help="Start no further row after this many minutes.")
@click.option("--images", type=int, help="Only rows of this many training images.")
@click.option("--seed", type=int, help="Only rows of this seed.")
def main(dense: Path | None, minutes: float, images: int | None, seed: int | None) -> None:
    """Measures the rows that are missing, and rewrites the table."""
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
