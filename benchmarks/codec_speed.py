"""Decoding speed of the codecs compared with the dense safetensors load, in one process, page cache warm.

    python benchmarks/codec_speed.py [--model resnet34] [--repeat 7] [--threads 2] [--cpu] [--json FILE]

The weights are the model's random weights, on 16 evenly spaced values over +-3 standard deviations of each tensor. In
the rows "uneven" every row and column of a tensor has been multiplied by a factor of its own between 1/4 and 1, which
the codec ``classes`` makes use of and the others do not.
"Decode" is ``load_state_dict(file)`` and the copy into an existing model, which the dense load includes too.
"Indices" decodes the index streams alone, one after the other in one thread, with all codecs in turn in each
repetition. "First load" is ``load(file)`` in a new process that has imported torch and timm; it includes building the
model and what the codec imports and compiles on first use. The row "create_model" is timm's construction of the model
with its random initialisation: it separates a slow machine from a slow load. Where ``nncodec`` (ISO NNC) is
installed, its arithmetic coder codes the same indices, counted from the middle codeword. ``--cpu`` measures processor
time instead of wall time (except for the first load), for a machine that has other work.
"""

from __future__ import annotations

import argparse
import importlib.util
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

from compressor.formats.codecs.registry import CODECS
from compressor.formats.content import Content, RawTensor, SharedTensor, Table
from compressor.formats.file.reader import PackedFile
from compressor.formats.file.writer import write
from compressor.formats.loader import load, load_state_dict

FIRST_LOAD = """
import sys, time, torch, timm
from compressor.formats.loader import load
torch.set_num_threads(int(sys.argv[2]))
start = time.perf_counter(); load(sys.argv[1]); print(time.perf_counter() - start)
"""


clock = time.perf_counter


def median(act: Callable[[], object], repeat: int) -> float:
    """Returns the median seconds of ``repeat`` calls, after one call that is not counted."""
    act()
    seconds = []
    for _ in range(repeat):
        start = clock()
        act()
        seconds.append(clock() - start)
    return statistics.median(seconds)


def to_content(model: nn.Module, name: str, uneven: bool = False) -> Content:
    """Returns the content of a packed file whose tensors of two or more dimensions share 16 evenly spaced values.

    Args:
        model: the model.
        name: what timm calls it.
        uneven: whether rows and columns are multiplied by factors first.
    """
    rng = np.random.default_rng(0)
    sites: dict[str, SharedTensor] = {}
    books: list[Table] = []
    untouched: dict[str, RawTensor] = {}
    for key, tensor in model.state_dict().items():
        if tensor.ndim >= 2:
            factors = [4.0 ** -rng.random(size).astype(np.float32) for size in tensor.shape[:2]]
            placed = np.multiply.outer(*factors).reshape(*tensor.shape[:2], *[1] * (tensor.ndim - 2))
            weights = (tensor.numpy() * placed if uneven else tensor.numpy()).reshape(-1)
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
    """Decodes a packed file into an existing model."""
    model.load_state_dict(load_state_dict(path))


def decode_indices(path: Path) -> None:
    """Decodes the index streams of a packed file alone."""
    with PackedFile.open(path) as file:
        for name in file.sites:
            file.indices(name)


def measure_codec(codec: str, content: Content, model: nn.Module, folder: Path, repeat: int) -> dict[str, Any]:
    """Returns the sizes and times of one codec on the whole model."""
    path = folder / f"{codec}.safetensors"
    pack = median(lambda: write(path, content, codec, force=True), 1)
    command = [sys.executable, "-c", FIRST_LOAD, str(path), str(torch.get_num_threads())]
    firsts = [float(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(repeat)]
    with PackedFile.open(path) as file:
        index_bytes = file.sizes().indices
    return {
        "bytes": path.stat().st_size,
        "index bytes": index_bytes,
        "pack and verify s": pack,
        "decode ms": 1e3 * median(lambda: fill(model, path), repeat),
        "load ms": 1e3 * median(lambda: load(path), repeat),
        "first load ms": 1e3 * statistics.median(firsts),
    }


def index_speeds(paths: dict[str, Path], content: Content, repeat: int) -> dict[str, float]:
    """Returns how many millions of indices a second each file's streams decode at.

    Args:
        paths: packed files of one content, by row.
        content: it.
        repeat: how often each is decoded, in turn, so that a change of the machine's speed meets all of them.
    """
    weights = sum(int(np.prod(site.shape)) for site in content.sites.values())
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(repeat + 1):
        for name, path in paths.items():
            start = clock()
            decode_indices(path)
            seconds[name].append(clock() - start)
    return {name: weights / statistics.median(times[1:]) / 1e6 for name, times in seconds.items()}


def measure_nncodec(content: Content, repeat: int) -> dict[str, Any]:
    """Returns size and times of NNCodec's arithmetic coder, set as its compress_model sets it, without codebooks."""
    from nncodec.extensions import deepCABAC
    from nncodec.nnc_core.hdsp.hdsp_tool import HDSP_OPTS_OFF

    off = HDSP_OPTS_OFF()
    levels = {
        name: np.ascontiguousarray(site.indices.astype(np.int32).reshape(site.shape) - 8)
        for name, site in content.sites.items()
    }
    streams: dict[str, Any] = {}

    def encode() -> None:
        for name, values in levels.items():
            encoder = deepCABAC.Encoder()
            encoder.initCtxModels(11, 1)
            encoder.encodeLayer(values, 0, 0, 0, 0, 0, np.zeros(len(values), np.int32), *off, 0, 0)
            streams[name] = encoder.finish()

    def decode() -> None:
        for name, values in levels.items():
            decoder = deepCABAC.Decoder()
            decoder.setStream(streams[name])
            decoder.initCtxModels(11)
            decoded = np.zeros(values.shape, np.int32)
            decoder.decodeLayer(decoded, 0, 0, 0, 0, *off, 0, 0)
            if not np.array_equal(decoded, values):
                raise RuntimeError(f"nncodec did not give {name} back")

    pack = median(encode, 1)
    weights = sum(values.size for values in levels.values())
    return {
        "index bytes": sum(len(stream) for stream in streams.values()),
        "pack and verify s": pack,
        "indices M/s": weights / median(decode, repeat) / 1e6,
    }


def measure(name: str, repeat: int) -> dict[str, dict[str, Any]]:
    """Returns the rows of the dense load, of every general codec, of the smallest codec per tensor, and of NNCodec."""
    np.ones(1 << 28).sum()  # 2 GB, freed at once: a virtual machine is slow to provide memory for the first time
    torch.manual_seed(0)
    model = timm.create_model(name)
    content = to_content(model, name)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense.safetensors"
        safetensors.torch.save_file(model.state_dict(), dense)
        loading = median(lambda: model.load_state_dict(safetensors.torch.load_file(dense)), repeat)
        rows["create_model"] = {"load ms": 1e3 * median(lambda: timm.create_model(name), repeat)}
        rows["dense"] = {"bytes": dense.stat().st_size, "decode ms": 1e3 * loading}
        codecs = [*sorted(name for name, codec in CODECS.items() if codec.general), "auto"]
        for ending, uneven, chosen in (("", False, codecs), (", uneven", True, ["ans", "classes"])):
            coded, place = to_content(model, name, uneven), Path(folder) / f"files{ending}"
            place.mkdir()
            for codec in chosen:
                row = measure_codec(codec, coded, model, place, repeat)
                rows[f"{codec}{ending}"] = row | {"times dense": row["decode ms"] / rows["dense"]["decode ms"]}
            paths = {f"{codec}{ending}": place / f"{codec}.safetensors" for codec in chosen}
            for row_name, speed in index_speeds(paths, coded, repeat).items():
                rows[row_name]["indices M/s"] = speed
        if importlib.util.find_spec("nncodec"):
            rows["nncodec"] = measure_nncodec(content, repeat)
    return rows


def main() -> None:
    """Prints the table, and writes JSON if ``--json`` is given."""
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
