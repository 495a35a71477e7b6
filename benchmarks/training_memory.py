"""Bytes per shared weight in the training of each scheme: held between steps (counted), and at most (measured).

    OMP_NUM_THREADS=1 python benchmarks/training_memory.py [--model resnet18] [--json FILE]

Fused AdamW, distillation from the dense network, batches of 8 images of 32x32. "Held" counts the tensors of model,
groups, gradients, optimiser and teacher, each storage once. "Highest over dense" is the highest resident size of a new
process during three steps, less that of a dense one with the same teacher, as in step_time.py (Linux only). The last
line is the number of bytes that autograd keeps for one image of 224x224 in resnet50: activations are what limits the
batch size.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from step_time import RETURN_FREED, dense_loss
from tabulate import tabulate
from torch import Tensor, nn

from compressor import SCHEMES, Compressor, Policy, Rule
from compressor.ops.nearest import nearest
from compressor.training.distillation import frozen_copy
from compressor.training.optim import use_fused_kernels

STEPS, BATCH = 3, 8


def tensors(value: Any) -> Iterator[Tensor]:
    """Yields all tensors in nested modules, lists and dicts, and their gradients."""
    if isinstance(value, Tensor):
        yield value
        if value.grad is not None:
            yield value.grad
    elif isinstance(value, nn.Module):
        yield from tensors([*value.parameters(), *value.buffers()])
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


def held(*values: Any) -> int:
    """Returns the bytes of all tensors in the values, each storage counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors(list(values))}
    return sum(storage.nbytes() for storage in storages.values())


def report(name: str, scheme: str) -> None:
    """Trains a few steps, and prints the bytes held, the highest resident size and the number of shared weights."""
    nearest(torch.zeros(1), torch.tensor([0.0, 1.0]))  # loads the compiler's library, 70 MB, in dense processes too
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    images, classes = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
    teacher: nn.Module | None
    if scheme == "dense":
        teacher, weights, kept = frozen_copy(model), 0, {}
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    else:
        job = Compressor(model, Policy([Rule("*", scheme=scheme)]), copy=False).prepare()
        teacher, weights, kept = job.teacher, sum(group.weights for group in job.groups), job.dense
        optimizer = torch.optim.AdamW(job.param_groups(lr=1e-3))
        job.attach(optimizer, total_steps=1000)
    use_fused_kernels(optimizer)
    Path("/proc/self/clear_refs").write_text("5")  # resets the highest resident size
    for _ in range(STEPS):
        output = model.train()(images)
        value = dense_loss(teacher, output, classes, images) if scheme == "dense" else job.loss(output, classes, images)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    print(json.dumps([held(model, teacher, kept, dict(optimizer.state)), int(line.split()[1]) * 1024, weights]))


def measure(name: str) -> list[dict[str, Any]]:
    """Returns the rows of the dense network and of every scheme, each measured in a new process."""
    rows: list[dict[str, Any]] = []
    for scheme in ("dense", *(name for name in sorted(SCHEMES) if SCHEMES[name].shares)):
        command = [sys.executable, __file__, "--model", name, "--memory-of", scheme]
        done = subprocess.run(command, capture_output=True, check=True, env=os.environ | RETURN_FREED)
        now, peak, weights = json.loads(done.stdout)
        if scheme == "dense":
            dense, highest = now, peak
            parameters = sum(p.numel() for p in timm.create_model(name, num_classes=10).parameters())
            rows.append({"scheme": scheme, "held": now / parameters, "highest over dense": None})
            continue
        held_per_weight, over = rows[0]["held"] + (now - dense) / weights, (peak - highest) / weights
        rows.append({"scheme": scheme, "held": held_per_weight, "highest over dense": over})
    return rows


def activation_bytes(name: str = "resnet50", images: int = 2) -> float:
    """Returns the bytes that autograd saves for the backward pass, per image, parameters and buffers excluded."""
    model = timm.create_model(name).train()
    of_model = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in of_model:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        output = model(torch.randn(images, 3, 224, 224))
    del output
    return sum(saved.values()) / images


def main() -> None:
    """Prints the table, and writes JSON if ``--json`` is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", metavar="SCHEME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        report(options.model, options.memory_of)
        return
    rows = measure(options.model)
    print(tabulate(rows, "keys", tablefmt="github", floatfmt=".2f"))
    activations = activation_bytes()
    print(f"\nresnet50, 224x224: {activations / 1e6:.1f} MB of activations an image in float32")
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "activations": activations}, indent=1))


if __name__ == "__main__":
    main()
