"""Time and memory of one training step, dense and with the schemes, in one process with steps in turn.

    python benchmarks/step_time.py [--steps 18] [--threads 2] [--default-malloc] [--json FILE]

Random images and classes, 4 bits, fused AdamW, cross entropy. Times are without distillation, since a teacher costs
the same forward pass with every scheme. Three steps of each scheme are not counted. The table has medians of wall time
and of processor time, and the mean of the ratios of each step to the dense step of the same turn. The turns are spread
over the rounds of a training, since a scheme that fixes weights has less work in each; a round begins outside the
timed step. The C library is set to keep freed memory, which the command does too: otherwise, in some steps of some
processes, dense ones included, clearing fresh pages takes as long as sharing.

Memory is measured with distillation from a copy of the dense network, where a scheme keeps the dense weights too. It
is the highest resident size of a new process during five steps, less that of a dense one with the same teacher, per
shared weight. The time before the first step does not count, and the C library is set to return freed memory at once
(Linux).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional

from compressor import Compressor, Policy, Rule
from compressor.cli.malloc import keep_freed_memory
from compressor.lifecycle.prepare import start_rounds
from compressor.ops.nearest import nearest
from compressor.training.distillation import distillation, frozen_copy
from compressor.training.optim import use_fused_kernels

RULES = {"learnt, a price": Rule("*", "learnt", rate=1e-5), "wfn": Rule("*", "wfn")}  # the others have 4 bits
SCHEMES = "dense", "learnt", "learnt, a price", "kmeans", "inq", "wfn"
IN_ROUNDS = "inq", "wfn"
WARM_UP, MEMORY_STEPS = 3, 5
ALL_STEPS = 1_000  # length of the simulated training: learnt re-seeds unused codewords eight times in it
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
Step = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """A timm model, and the height, number and channels of the images in its batches."""

    model: str
    size: int
    batch: int
    channels: int


CASES = Case("resnet34", 32, 64, 1), Case("resnet18", 32, 64, 1), Case("resnet18", 224, 16, 3)


def make_step(case: Case, scheme: str, distilled: bool = False) -> tuple[Step, Compressor | None]:
    """Returns a function that takes one training step, with or without a teacher, and the job (None for dense)."""
    torch.manual_seed(0)
    model = timm.create_model(case.model, num_classes=10, in_chans=case.channels)
    if scheme == "dense":
        teacher = frozen_copy(model) if distilled else None
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        return make_step_of(case, model, optimizer, functools.partial(dense_loss, teacher)), None
    policy = Policy([RULES.get(scheme) or Rule("*", scheme, bits=4)])
    job = Compressor(model, policy, copy=False, teacher="dense" if distilled else None).prepare()
    optimizer = torch.optim.AdamW(job.param_groups(lr=1e-3))
    job.attach(optimizer, total_steps=ALL_STEPS)
    return make_step_of(case, job.model, optimizer, job.loss), job


def dense_loss(teacher: nn.Module | None, output: Tensor, classes: Tensor, images: Tensor) -> Tensor:
    """Returns the loss with which the schemes are trained; a ``teacher`` of None means without distillation."""
    task = functional.cross_entropy(output, classes)
    if teacher is None:
        return task
    with torch.no_grad():
        teacher_output = teacher(images)
    return 0.5 * task + 0.5 * distillation(output, teacher_output, 2.0)


def make_step_of(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[..., Any]) -> Step:
    """Returns a function that takes one step of the optimiser on one random batch."""
    use_fused_kernels(optimizer)
    images = torch.randn(case.batch, case.channels, case.size, case.size)
    classes = torch.randint(10, (case.batch,))
    model.train()

    def step() -> None:
        value = loss(model(images), classes, images)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return step


def step_times(case: Case, steps: int) -> dict[str, dict[str, float]]:
    """Returns the median milliseconds of a step of each scheme, and the mean ratio to the dense step of its turn."""
    prepared = {scheme: make_step(case, scheme) for scheme in SCHEMES}
    times: dict[str, list[tuple[float, float]]] = {scheme: [] for scheme in SCHEMES}
    for turn in range(WARM_UP + steps):
        for scheme, (step, job) in prepared.items():
            if scheme in IN_ROUNDS and job:
                start_rounds(job.groups, max(0, turn - WARM_UP) / steps)
            wall, processors = time.perf_counter(), time.process_time()
            step()
            times[scheme].append((time.perf_counter() - wall, time.process_time() - processors))
    figures: dict[str, dict[str, float]] = {scheme: {} for scheme in SCHEMES}
    for clock, name in enumerate(("step", "CPU")):
        dense_seconds = [pair[clock] for pair in times["dense"][WARM_UP:]]
        for scheme in SCHEMES:
            seconds = [pair[clock] for pair in times[scheme][WARM_UP:]]
            figures[scheme][f"{name} ms"] = 1e3 * statistics.median(seconds)
            ratios = [shared / dense for shared, dense in zip(seconds, dense_seconds, strict=True)]
            figures[scheme][f"{name} ratio"] = statistics.fmean(ratios)
    return figures


def report_memory(case: Case, scheme: str) -> None:
    """Prints the highest resident size of this process during a few steps, and the number of shared weights."""
    nearest(torch.zeros(1), torch.tensor([0.0, 1.0]))  # loads the compiler's library, 70 MB, in dense processes too
    step, job = make_step(case, scheme, distilled=True)
    Path("/proc/self/clear_refs").write_text("5")  # resets the highest resident size
    for _ in range(MEMORY_STEPS):
        step()
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    weights = sum(group.weights for group in job.groups) if job else 0
    print(json.dumps([int(line.split()[1]) * 1024, weights]))


def memory(case: Case) -> dict[str, float]:
    """Returns the bytes per shared weight that each scheme needs above the dense step."""
    peaks = {}
    for scheme in SCHEMES:
        command = [sys.executable, __file__, "--threads", str(torch.get_num_threads())]
        command += ["--memory-of", str(CASES.index(case)), scheme]
        done = subprocess.run(command, capture_output=True, check=True, env=os.environ | RETURN_FREED)
        peaks[scheme] = json.loads(done.stdout)
    dense = peaks["dense"][0]
    return {scheme: (peak - dense) / max(weights, 1) for scheme, (peak, weights) in peaks.items()}


def measure(steps: int) -> list[dict[str, Any]]:
    """Returns one row for each case and scheme."""
    rows = []
    for case in CASES:
        times, extra = step_times(case, steps), memory(case)
        for scheme in SCHEMES:
            row: dict[str, Any] = {"model": case.model, "size": case.size, "batch": case.batch, "scheme": scheme}
            rows.append(row | times[scheme] | {"extra bytes per weight": extra[scheme]})
    return rows


def main() -> None:
    """Prints the table, and writes JSON if ``--json`` is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=18, help="of each scheme; a multiple of 9, the rounds of wfn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--default-malloc", action="store_true", help="do not set the C library to keep freed memory")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "SCHEME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        report_memory(CASES[int(options.memory_of[0])], options.memory_of[1])
        return
    if not options.default_malloc:
        keep_freed_memory()
    rows = measure(options.steps)
    print(tabulate(rows, "keys", tablefmt="github", floatfmt=("", "", "", "", ".0f", ".2f", ".0f", ".2f", ".1f")))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
