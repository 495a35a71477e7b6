"""Decoding speed of the codecs beside the dense safetensors load, in one process, page cache warm.

    python benchmarks/codec_speed.py [--model resnet34] [--repeat 7] [--threads 2] [--cpu] [--json FILE]

The weights are the model's random ones on 16 evenly spaced values over +-3 standard deviations of each tensor.
"Decode" is ``load_state_dict(file)`` and the copy into a ready-made model, as the dense load has it; "indices" is
the index streams alone; "first use" is the same decode in a new process, without the import of torch and timm, with
what the codec imports and compiles on first use. ``--cpu`` counts processor time instead of time on the wall (first use
excepted), for a machine with other work to do.
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
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from torch import nn

from compressor.formats.codec import CODECS
from compressor.formats.loader import load, load_state_dict
from compressor.formats.packed import write
from compressor.formats.reader import PackedFile
from compressor.formats.record import Content, RawTensor, SharedTensor, Table

FIRST_USE = """
import sys, time, torch, timm
from compressor.formats.loader import load_state_dict
start = time.perf_counter(); load_state_dict(sys.argv[1]); print(time.perf_counter() - start)
"""


clock = time.perf_counter


def median(act: Callable[[], object], repeat: int) -> float:
    """Give the median seconds of several runs, after one that is not counted."""
    act()
    seconds = []
    for _ in range(repeat):
        start = clock()
        act()
        seconds.append(clock() - start)
    return statistics.median(seconds)


def to_content(model: nn.Module, name: str) -> Content:
    """Share 16 evenly spaced values in every tensor of two or more dimensions."""
    sites: dict[str, SharedTensor] = {}
    books: list[Table] = []
    untouched: dict[str, RawTensor] = {}
    for key, tensor in model.state_dict().items():
        if tensor.ndim >= 2:
            weights = tensor.numpy().reshape(-1)
            spread = float(weights.std())
            book = Table.of(np.linspace(-3, 3, 16) * spread)
            nearest = np.clip(np.rint((weights / spread + 3) / 0.4), 0, 15).astype(np.uint8)
            sites[key] = SharedTensor(tuple(tensor.shape), len(books), nearest)
            books.append(book)
        else:
            kind = "I64" if tensor.dtype == torch.int64 else "F32"
            untouched[key] = RawTensor(kind, tuple(tensor.shape), tensor.numpy().tobytes())
    return Content(sites, tuple(books), untouched, model={"name": name, "args": {}})


def fill(model: nn.Module, path: Path) -> None:
    """Decode a packed file into a ready-made model."""
    model.load_state_dict(load_state_dict(path))


def decode_indices(path: Path) -> None:
    """Decode the index streams alone."""
    with PackedFile.open(path) as file:
        for name in file.sites:
            file.indices(name)


def measure_codec(codec: str, content: Content, model: nn.Module, folder: Path, repeat: int) -> dict[str, Any]:
    """Measure one codec on the whole model."""
    path = folder / f"{codec}.safetensors"
    weights = sum(int(np.prod(site.shape)) for site in content.sites.values())
    pack = median(lambda: write(path, content, codec, force=True), 1)
    indices = median(lambda: decode_indices(path), repeat)
    first = subprocess.run([sys.executable, "-c", FIRST_USE, str(path)], capture_output=True, text=True, check=True)
    return {
        "bytes": path.stat().st_size,
        "pack and verify s": pack,
        "indices M/s": weights / indices / 1e6,
        "decode ms": 1e3 * median(lambda: fill(model, path), repeat),
        "load ms": 1e3 * median(lambda: load(path), repeat),
        "first use ms": 1e3 * float(first.stdout),
    }


def measure(name: str, repeat: int) -> dict[str, dict[str, Any]]:
    """Measure the dense load, every general codec, and the smallest of them."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    content = to_content(model, name)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense.safetensors"
        safetensors.torch.save_file(model.state_dict(), dense)
        loading = median(lambda: model.load_state_dict(safetensors.torch.load_file(dense)), repeat)
        rows["dense"] = {"bytes": dense.stat().st_size, "decode ms": 1e3 * loading}
        for codec in [*sorted(name for name, codec in CODECS.items() if codec.general), "auto"]:
            rows[codec] = measure_codec(codec, content, model, Path(folder), repeat)
            rows[codec]["times dense"] = rows[codec]["decode ms"] / rows["dense"]["decode ms"]
    return rows


def main() -> None:
    """Print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet34")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.cpu:
        global clock
        clock = time.process_time
    torch.set_num_threads(options.threads)
    rows = measure(options.model, options.repeat)
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    print(" | ".join(["", *columns]))
    for name, row in rows.items():
        cells = [
            f"{row[column]:,.1f}" if isinstance(row.get(column), float) else str(row.get(column, ""))
            for column in columns
        ]
        print(" | ".join([name, *cells]))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
