"""Latency and resident weight bytes of packed and dense inference, in one process, with runs in turn.

    python benchmarks/packed_inference.py [--model resnet34] [--bits 4] [--size 224] [--repeat 9] [--threads 1]

The weights are the model's random weights, shared by k-means: neither time nor memory depends on their values.
Resident bytes are those of parameters and buffers; "shared weights" are the tensors that share values.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from tabulate import tabulate
from torch import nn

from compressor import Compressor, Policy, Rule, load
from compressor.formats.file.reader import PackedFile


def seconds(act: Callable[[], object]) -> float:
    """Returns the seconds of one call."""
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def latencies(models: dict[str, nn.Module], batch: int, size: int, repeat: int) -> list[float]:
    """Returns the median seconds of a forward pass of each model, after one that is not counted.

    Raises:
        SystemExit: if the logits of the models are not bit-equal.
    """
    images = torch.randn(batch, 3, size, size)
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        logits = [model(images) for model in models.values()]
        if not torch.equal(*logits):
            raise SystemExit("packed logits are not those of the dense model")
        for _ in range(repeat):
            for name, model in models.items():
                times[name].append(seconds(lambda run=model: run(images)))  # type: ignore[misc]
    return [statistics.median(taken) for taken in times.values()]


def resident(model: nn.Module, untouched: set[str]) -> tuple[int, int]:
    """Returns the bytes of the shared tensors, and of all parameters and buffers."""
    held = [*model.named_parameters(), *model.named_buffers()]
    shared = sum(tensor.nbytes for name, tensor in held if name not in untouched)
    return shared, sum(tensor.nbytes for _, tensor in held)


def packed_file(name: str, bits: int, folder: Path) -> Path:
    """Writes the model with its random weights shared, without training, and returns the path."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    job = Compressor(model, Policy([Rule("*", scheme="kmeans", bits=bits)]), model_args={}, teacher=None)
    job.prepare().finish().save(folder / "model.safetensors")
    return folder / "model.safetensors"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet34")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = packed_file(options.model, options.bits, Path(folder))
        models = {mode: load(path, weights=mode) for mode in ("dense", "packed")}
        with PackedFile.open(path) as file:
            untouched = set(file.untouched)
    rows = [
        [
            f"latency, batch {batch} (ms)",
            *(1e3 * latency for latency in latencies(models, batch, options.size, options.repeat)),
        ]
        for batch in (1, 8)
    ]
    sizes = [resident(model, untouched) for model in models.values()]
    rows.append(["resident bytes, shared weights", *(float(shared) for shared, _ in sizes)])
    rows.append(["resident bytes, whole model", *(float(total) for _, total in sizes)])
    table = [[label, dense, packed, packed / dense] for label, dense, packed in rows]  # type: ignore[operator]
    print(tabulate(table, ["", "dense", "packed", "ratio"], tablefmt="github", floatfmt=("", ",.0f", ",.0f", ".3f")))


if __name__ == "__main__":
    main()
