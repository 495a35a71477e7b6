"""One training step: dense and the schemes side by side in one process, steps taken in turn.

    python benchmarks/step_time.py [--steps 18] [--threads 2] [--as-it-is] [--json FILE]

Random images and classes, 4 bits, AdamW in one pass, cross entropy. Times are without distillation: a teacher costs
the same forward pass whatever the scheme. They are after three steps that are not counted, on the wall and of the
processors; medians, and the mean of the ratios, each step against the dense one of the same turn. Turns are spread over
the rounds of a run, which begin outside the time: a scheme that fixes weights has less to do in each. The C library is
told to keep freed memory, as the command does: else to clear it anew takes as long as sharing does, in some steps of
some processes, the dense one's among them.

Memory is with distillation from a copy of the dense network, in which the scheme keeps its dense weights too: the
highest resident size of a process of its own while it takes five steps, less that of a dense one with such a teacher,
per shared weight; what went before the first step is not counted, and the C library is told to give freed memory back
at once (Linux).
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

SCHEMES = "dense", "learnt", "kmeans", "inq", "wfn"
IN_ROUNDS = "inq", "wfn"
WARM_UP, MEMORY_STEPS = 3, 5
ALL_STEPS = 1_000  # of the run the steps are part of: learnt looks for unused codewords eight times in it
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
Step = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """A network and the images it is trained on."""

    model: str
    size: int
    batch: int
    channels: int


CASES = Case("resnet34", 32, 64, 1), Case("resnet18", 32, 64, 1), Case("resnet18", 224, 16, 3)


def make_step(case: Case, scheme: str, taught: bool = False) -> tuple[Step, Compressor | None]:
    """Give a training step of a network, by itself or under a teacher, and what compresses it."""
    torch.manual_seed(0)
    model = timm.create_model(case.model, num_classes=10, in_chans=case.channels)
    if scheme == "dense":
        teacher = frozen_copy(model) if taught else None
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        return _step(case, model, optimizer, functools.partial(dense_loss, teacher)), None
    policy = Policy([Rule("*", scheme) if scheme == "wfn" else Rule("*", scheme, bits=4)])
    job = Compressor(model, policy, copy=False, teacher="dense" if taught else None).prepare()
    optimizer = torch.optim.AdamW(job.param_groups(lr=1e-3))
    job.attach(optimizer, total_steps=ALL_STEPS)
    return _step(case, job.model, optimizer, job.loss), job


def dense_loss(teacher: nn.Module | None, output: Tensor, classes: Tensor, images: Tensor) -> Tensor:
    """Give the loss that the schemes are trained with."""
    task = functional.cross_entropy(output, classes)
    if teacher is None:
        return task
    with torch.no_grad():
        wanted = teacher(images)
    return 0.5 * task + 0.5 * distillation(output, wanted, 2.0)


def _step(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[..., Any]) -> Step:
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
    """Give the median times of a step of each scheme, and how many times a dense one they take in the mean."""
    made = {scheme: make_step(case, scheme) for scheme in SCHEMES}
    times: dict[str, list[tuple[float, float]]] = {scheme: [] for scheme in SCHEMES}
    for turn in range(WARM_UP + steps):
        for scheme, (step, job) in made.items():
            if scheme in IN_ROUNDS and job:
                start_rounds(job.groups, max(0, turn - WARM_UP) / steps)
            wall, processors = time.perf_counter(), time.process_time()
            step()
            times[scheme].append((time.perf_counter() - wall, time.process_time() - processors))
    figures: dict[str, dict[str, float]] = {scheme: {} for scheme in SCHEMES}
    for clock, name in enumerate(("step", "CPU")):
        dense = [took[clock] for took in times["dense"][WARM_UP:]]
        for scheme in SCHEMES:
            own = [took[clock] for took in times[scheme][WARM_UP:]]
            figures[scheme][f"{name} ms"] = 1e3 * statistics.median(own)
            ratios = [mine / other for mine, other in zip(own, dense, strict=True)]
            figures[scheme][f"{name} ratio"] = statistics.fmean(ratios)
    return figures


def report_memory(case: Case, scheme: str) -> None:
    """Print the highest resident size of this process during a few steps, and the number of shared weights."""
    nearest(torch.zeros(1), torch.tensor([0.0, 1.0]))  # the compiler's library, 70 MB whatever the model, is in all
    step, job = make_step(case, scheme, taught=True)
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    for _ in range(MEMORY_STEPS):
        step()
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    weights = sum(group.weights for group in job.groups) if job else 0
    print(json.dumps([int(line.split()[1]) * 1024, weights]))


def memory(case: Case) -> dict[str, float]:
    """Give the bytes per shared weight that each scheme needs over dense."""
    found = {}
    for scheme in SCHEMES:
        command = [sys.executable, __file__, "--threads", str(torch.get_num_threads())]
        command += ["--memory-of", str(CASES.index(case)), scheme]
        done = subprocess.run(command, capture_output=True, check=True, env=os.environ | GIVE_BACK)
        found[scheme] = json.loads(done.stdout)
    dense = found["dense"][0]
    return {scheme: (peak - dense) / max(weights, 1) for scheme, (peak, weights) in found.items()}


def measure(steps: int) -> list[dict[str, Any]]:
    """Measure every case."""
    rows = []
    for case in CASES:
        times, extra = step_times(case, steps), memory(case)
        for scheme in SCHEMES:
            row: dict[str, Any] = {"model": case.model, "size": case.size, "batch": case.batch, "scheme": scheme}
            rows.append(row | times[scheme] | {"extra bytes per weight": extra[scheme]})
    return rows


def main() -> None:
    """Print the table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=18, help="of each scheme; a multiple of 9, the rounds of wfn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--as-it-is", action="store_true", help="do not tell the C library to keep freed memory")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "SCHEME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        report_memory(CASES[int(options.memory_of[0])], options.memory_of[1])
        return
    if not options.as_it_is:
        keep_freed_memory()
    rows = measure(options.steps)
    print(tabulate(rows, "keys", tablefmt="github", floatfmt=("", "", "", "", ".0f", ".2f", ".0f", ".2f", ".1f")))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
