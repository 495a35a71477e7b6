"""Bytes per shared weight while each scheme trains: what is held between steps, counted, and the highest, measured.

    OMP_NUM_THREADS=1 python benchmarks/training_memory.py [--model resnet18] [--json FILE]

AdamW in one pass, distillation from the dense network, batch 8 of 32x32. Held: each tensor of model, groups, gradients,
optimiser and teacher, each storage once. Highest: the resident size of a process of its own in three steps, above
that of one for the dense network under such a teacher, as in step_time.py (Linux only). Last, the bytes that autograd
keeps of one image of 224x224 in resnet50, for activations are what the batch size is about.
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
from step_time import GIVE_BACK, dense_loss
from tabulate import tabulate
from torch import Tensor, nn

from compressor import SCHEMES, Compressor, Policy, Rule
from compressor.ops.nearest import nearest
from compressor.training.distillation import frozen_copy
from compressor.training.optim import use_fused_kernels

STEPS, BATCH = 3, 8


def tensors(value: Any) -> Iterator[Tensor]:
    """Give all tensors in a nesting, and their gradients."""
    if isinstance(value, Tensor):
        yield value
        if value.grad is not None:
            yield value.grad
    elif isinstance(value, nn.Module):
        yield from (found for tensor in [*value.parameters(), *value.buffers()] for found in tensors(tensor))
    elif isinstance(value, dict | list):
        yield from (found for part in (value.values() if isinstance(value, dict) else value) for found in tensors(part))


def held(*values: Any) -> int:
    """Count the bytes of all storages once."""
    storages = {found.untyped_storage().data_ptr(): found.untyped_storage() for found in tensors(list(values))}
    return sum(storage.nbytes() for storage in storages.values())


def report(name: str, scheme: str) -> None:
    """Train a few steps; print bytes held, the highest resident size, and how many weights are shared."""
    nearest(torch.zeros(1), torch.tensor([0.0, 1.0]))  # the compiler's library, 70 MB whatever the model, is in all
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
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    for _ in range(STEPS):
        output = model.train()(images)
        value = dense_loss(teacher, output, classes, images) if scheme == "dense" else job.loss(output, classes, images)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    print(json.dumps([held(model, teacher, kept, dict(optimizer.state)), int(line.split()[1]) * 1024, weights]))


def measure(name: str) -> list[dict[str, Any]]:
    """Measure the dense network and every scheme, each in a process of its own."""
    rows: list[dict[str, Any]] = []
    for scheme in ("dense", *(name for name in sorted(SCHEMES) if SCHEMES[name].shares)):
        command = [sys.executable, __file__, "--model", name, "--memory-of", scheme]
        done = subprocess.run(command, capture_output=True, check=True, env=os.environ | GIVE_BACK)
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
    """Count what autograd keeps for the backward pass of one image, but for the parameters."""
    model = timm.create_model(name).train()
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(torch.randn(images, 3, 224, 224))
    del output
    return sum(kept.values()) / images


def main() -> None:
    """Print the table, and write JSON where asked."""
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
