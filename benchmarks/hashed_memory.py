"""Peak memory and time of virtual HashedNets and of dense layers, in training and inference, each in a new process.

    python benchmarks/hashed_memory.py [--steps 5] [--threads 1] [--json FILE]

The networks are linear layers with ReLU between them, trained by AdamW. The first is a small example: 28 inputs and a
bias node, then 100, 50, 10 and 1 nodes, without other biases. "hashed" keeps indices and a dense weight while it
trains; "virtual" keeps neither, nor does its inference, which loads the packed file with ``weights="packed"``. Memory
is the highest resident size of the whole process, the construction of the network included, less that of a process
with the same imports and no network (Linux only). Stored bytes are values and seeds; dense bytes are all weights.
Times are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.nn import functional

from compressor import Compressor, Policy, Rule, load
from compressor.formats.file.reader import PackedFile

WARM_UP = 1


@dataclass(frozen=True)
class Case:
    """One network: layer widths, batch size, whether layers have biases, and the settings of ``hashed``."""

    widths: tuple[int, ...]
    batch: int
    bias: bool
    shared: dict[str, Any]

    def model(self, device: str) -> nn.Module:
        """Returns the network; on the device ``meta`` its weights take no memory."""
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(self.widths):
            layers += [nn.Linear(inputs, outputs, bias=self.bias, device=device), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    @property
    def label(self) -> str:
        """The widths and the settings, as the table shows them."""
        return (
            "-".join(map(str, self.widths)) + ", " + ", ".join(f"{key} {value}" for key, value in self.shared.items())
        )


CASES = (
    Case((29, 100, 50, 10, 1), 64, False, {"codewords": 8}),
    Case((1024, 1024, 1024, 10), 64, True, {"compression": 64}),
    Case((4096, 4096, 4096, 10), 64, True, {"compression": 64}),
)
TRAINED = "dense", "hashed", "virtual"
USES = *(f"train {mode}" for mode in TRAINED), "infer dense", "infer packed"


def prepared(case: Case, virtual: bool) -> Compressor:
    """Returns a job that shares the weights of a new network; a virtual one never allocates its dense weights."""
    model = case.model("meta" if virtual else "cpu")
    policy = Policy([Rule("*", scheme="hashed", **case.shared)])
    return Compressor(model, policy, copy=False, teacher=None, from_scratch=True).prepare(virtual=virtual)


def training_step(case: Case, mode: str) -> Callable[[], None]:
    """Returns a function that takes one training step, dense, hashed or virtual."""
    if mode == "dense":
        model = case.model("cpu")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    else:
        job = prepared(case, mode == "virtual")
        model, optimizer = job.model, torch.optim.AdamW(job.param_groups(lr=1e-3))
    x, target = torch.randn(case.batch, case.widths[0]), torch.randn(case.batch, case.widths[-1])

    def step() -> None:
        loss = functional.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def inference(case: Case, mode: str, path: Path) -> Callable[[], None]:
    """Returns a function that runs one forward pass of the network in the file."""
    model, x = load(path, case.model("meta"), weights=mode), torch.randn(case.batch, case.widths[0])

    @torch.inference_mode()
    def step() -> None:
        model(x)

    return step


def measure_here(case: Case | None, use: str, path: Path, steps: int) -> dict[str, float]:
    """Returns the highest resident size of this process in bytes, and the median seconds of a step.

    A ``case`` of None builds no network: its size is what the imports take.
    """
    times = [0.0]
    if case is not None:
        kind, mode = use.split()
        step = training_step(case, mode) if kind == "train" else inference(case, mode, path)
        times = []
        for _ in range(WARM_UP + steps):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return {"peak": int(line.split()[1]) * 1024, "seconds": statistics.median(times[WARM_UP:] or times)}


def measure(case: int | None, use: str, path: Path, options: argparse.Namespace) -> dict[str, float]:
    """Returns what ``measure_here`` measures in a new process."""
    command = [sys.executable, __file__, "--steps", str(options.steps), "--threads", str(options.threads)]
    command += ["--only", "none" if case is None else str(case), use, str(path)]
    measured: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return measured


def rows_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns one row for each case, every use measured after the other."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        imports = measure(None, "imports", Path(), options)["peak"]
        for number, case in enumerate(CASES):
            path = Path(folder, f"{number}.safetensors")
            prepared(case, virtual=False).finish().save(path)
            with PackedFile.open(path) as file:
                sizes = file.sizes()
                weights = sum(site.weights for site in file.sites.values())
            row: dict[str, Any] = {"net": case.label, "weights": weights, "dense bytes": 4 * weights}
            row["stored bytes"] = sizes.codebooks + sizes.indices
            for use in USES:
                measured = measure(number, use, path, options)
                row[f"{use} MiB"] = (measured["peak"] - imports) / 2**20
                row[f"{use} ms"] = 1e3 * measured["seconds"]
            rows.append(row)
    return rows


def main() -> None:
    """Prints the table, and writes JSON if ``--json`` is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs=3, metavar=("CASE", "USE", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.only:
        number, use, path = options.only
        case = None if number == "none" else CASES[int(number)]
        print(json.dumps(measure_here(case, use, Path(path), options.steps)))
        return
    rows = rows_of(options)
    for unit, digits in (("MiB", ".1f"), ("ms", ".1f")):
        shown = [
            {key: value for key, value in row.items() if key.endswith(unit) or not key.endswith((" MiB", " ms"))}
            for row in rows
        ]
        print(tabulate(shown, "keys", tablefmt="github", floatfmt=digits, intfmt=","), end="\n\n")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
