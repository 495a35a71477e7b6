"""Ways to let indices settle at the end of a training with the rate in the loss, compared at equal targets.

    OMP_NUM_THREADS=1 python benchmarks/settling.py --dense FOLDER [--minutes 30]

Each network is post-trained to a target in bits per shared weight and trained on by the defaults, with one of
``WAYS`` acting on its master weights after each step. Files are compared by their divergence from the dense outputs on
the last 5,000 training images; test images are not used. Each row is appended to ``results/settling.jsonl`` as soon as
it is measured and is not measured again. The table between the markers of ``README.md`` is rewritten from all rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from nncodec_peer import NNCodec
from page import put
from peer_environment import default_folder
from post_training import Bench, args
from slices import measure_missing, rows_of
from torch import Tensor, nn
from torch.nn import functional

from compressor import Compressor
from compressor.formats.errors import UsageError
from compressor.sharing.group_state import GroupState

RESULTS = Path(__file__).parent / "results" / "settling.jsonl"
NETS = "test_resnet", "test_vit"
BITS = 2.0, 1.0, 0.3, 0.1  # of the file, for each shared weight
BATCH, DISTILL, LR, EPOCHS = 64, 0.5, 3e-4, 1  # as by default, but for the epochs
LAST = 0.8  # of the training: what is done at its end begins here
HALF, RESTED = 0.5, 0.1  # of the training: when weights begin to be frozen, and for how long an index has to rest
COMMITMENT = 0.01  # of the way from a master weight to its codeword, in each step


@dataclass(frozen=True)
class Run:
    """One row: a network, the bits of the file for each shared weight, and the way to settle."""

    net: str
    bits: float
    way: str


class Plain:
    """Lets the learning rate alone settle the indices.

    Args:
        group: of one tensor, with a price.
    """

    def __init__(self, group: GroupState) -> None:
        self.group, (self.site,) = group, group.sites

    @property
    def master(self) -> Tensor:
        """The master weights, float[shape]."""
        return self.group.master_weight(self.site).detach()

    @property
    def rounded(self) -> Tensor:
        """The codewords of the weights, float[shape]."""
        module, name = self.site.owners[0]
        value: Tensor = getattr(module, name)
        return value.detach()

    def after(self, progress: float) -> None:
        """Changes the master weights after a step.

        Args:
            progress: of the training, 0 to 1.
        """


class Held(Plain):
    """Holds all indices in the last fifth, so that norms and biases alone are trained."""

    kept: Tensor | None = None

    def after(self, progress: float) -> None:
        """See ``Plain``."""
        if progress >= LAST:
            self.kept = self.rounded.clone() if self.kept is None else self.kept
            self.master.copy_(self.kept)


class Frozen(Plain):
    """Freezes each weight whose index has rested, in the second half."""

    def __init__(self, group: GroupState) -> None:
        super().__init__(group)
        self.seen, self.since = self.rounded.clone(), torch.zeros(self.master.shape)
        self.kept, self.is_kept = self.master.clone(), torch.zeros(self.master.shape, dtype=torch.bool)

    def after(self, progress: float) -> None:
        """See ``Plain``."""
        self.master.copy_(torch.where(self.is_kept, self.kept, self.master))
        rounded = self.rounded
        self.since[rounded != self.seen] = progress
        self.seen = rounded.clone()
        if progress >= HALF:
            rested = (progress - self.since >= RESTED) & ~self.is_kept
            self.kept = torch.where(rested, rounded, self.kept)
            self.is_kept |= rested


class Committed(Plain):
    """Draws each weight to its codeword."""

    def after(self, progress: float) -> None:
        """See ``Plain``."""
        self.master.lerp_(self.rounded, COMMITMENT)


class Averaged(Plain):
    """Ends with the mean of the master weights of the last fifth, as stochastic weight averaging does."""

    def __init__(self, group: GroupState) -> None:
        super().__init__(group)
        self.count, self.total = 0, torch.zeros(self.master.shape, dtype=torch.float64)

    def after(self, progress: float) -> None:
        """See ``Plain``."""
        if progress >= LAST:
            self.count += 1
            self.total += self.master
        if progress >= 1:
            self.master.copy_(self.total / self.count)


WAYS: dict[str, Callable[[GroupState], Plain]] = {
    "plain": Plain,
    "norms alone in the last fifth": Held,
    "frozen after resting a tenth": Frozen,
    f"commitment, {COMMITMENT} a step": Committed,
    "mean of the last fifth": Averaged,
}


def runs() -> Iterator[Run]:
    """Yields all rows."""
    for net in NETS:
        for bits in BITS:
            yield from (Run(net, bits, way) for way in WAYS)


def measure(bench: Bench, run: Run) -> dict[str, Any]:
    """Returns one row."""
    torch.manual_seed(0)
    dense, start = bench.dense(run.net), time.process_time()
    job = Compressor(bench.dense(run.net), target_bits=run.bits, model_args=args(run.net), distill=DISTILL, seed=0)
    job.prepare(calibration=bench.images(0))
    ways = [WAYS[run.way](length.group) for length in job.control.lengths] if job.control else []

    def settle(step: int, steps: int, loss: Tensor) -> None:
        del loss
        with torch.no_grad():
            for way in ways:
                way.after(step / steps)

    loader, target = bench.data.train_loader(BATCH, 0), job.control.target if job.control else 0
    job.finetune(loader, epochs=EPOCHS, lr=LR, distill=DISTILL, on_step=settle)
    size = len(job.finish(half_untouched=True).to_bytes())
    row = {"target": target, "file": size, **distance(job.model, dense, bench.data.eval_loader(256, "validation"))}
    return row | {"cpu_seconds": round(time.process_time() - start)}


def reached(bench: Bench, run: Run) -> dict[str, Any]:
    """Returns one row, or that its target is out of reach."""
    try:
        return measure(bench, run)
    except UsageError as exc:  # less than names, norms and biases take
        print(f"{run}: {exc}")
        return {"refused": "out of reach"}


@torch.no_grad()
def distance(model: nn.Module, dense: nn.Module, batches: Any) -> dict[str, float]:
    """Returns the mean divergence from the dense outputs, in nats, the cross entropy, and top-1 of both networks."""
    model.eval()
    sums: Sequence[float] = [0.0] * 4
    n = 0
    for images, labels in batches:
        ours, theirs = model(images), dense(images)
        new = [
            functional.kl_div(ours.log_softmax(1), theirs.log_softmax(1), log_target=True, reduction="sum"),
            functional.cross_entropy(ours, labels, reduction="sum"),
            (ours.argmax(1) == labels).sum(),
            (theirs.argmax(1) == labels).sum(),
        ]
        sums, n = [total + float(one) for total, one in zip(sums, new, strict=True)], n + len(labels)
    names = "divergence", "cross_entropy", "top1", "dense_top1"
    return {name: round(total / n, 5) for name, total in zip(names, sums, strict=True)}


def table(rows: list[dict[str, Any]]) -> str:
    """Returns a Markdown table: a line for each network and way, with divergence and top-1 at each size."""
    lines = [f"| network | way | {' | '.join(f'{bits:g} bits' for bits in BITS)} |", "|---|---|" + "--:|" * len(BITS)]
    found = {(row["net"], row["bits"], row["way"]): row for row in rows}
    for net in NETS:
        for way in WAYS:
            cells = [cell(found.get((net, bits, way))) for bits in BITS]
            lines.append(f"| {net} | {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(row: dict[str, Any] | None) -> str:
    """Returns the divergence and top-1 of a row; why there are none; nothing where it was not measured."""
    if row is None:
        return ""
    return row.get("refused") or f"{row['divergence']:.4f}, {100 * row['top1']:.1f} %, {row['file']:,}"


@click.command()
@click.option("--dense", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder of dense weights.")
@click.option("--minutes", default=float("inf"), help="Start no further row after this many minutes.")
@click.option("--net", type=click.Choice(NETS), help="Only rows of this network.")
@click.option("--bits", type=click.Choice([f"{bits:g}" for bits in BITS]), help="Only this target.")
def main(dense: Path | None, minutes: float, net: str | None, bits: str | None) -> None:
    """Measures the rows that are missing, and rewrites the table."""
    torch.set_num_threads(1)
    bench = Bench(dense, NNCodec(default_folder(), keep=True))
    chosen = (run for run in runs() if net in (None, run.net) and bits in (None, f"{run.bits:g}"))
    measure_missing(chosen, RESULTS, minutes, lambda run: reached(bench, run))
    put("settling", table(rows_of(RESULTS)))


if __name__ == "__main__":
    main()
