"""Bytes of each export of packed files, and the latency of those that run a model, in one process, with runs in turn.

    python benchmarks/exports.py [FILE ...] [--repeat 9] [--threads 1]

FILE is a packed file or zoo:NAME; without one, three checkpoints of the zoo. Targets whose packages are not installed
are left out, and those that give no model; those that do not run here have no latency, which is that of one image. The
row of a target that writes no file is its estimate, of weights alone. The table goes into docs/deploy.md.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from packed_inference import seconds
from tabulate import tabulate

import compressor
from compressor.calibration.image_shape import image_shape
from compressor.deployment.estimate import estimate
from compressor.deployment.export import Exported
from compressor.deployment.registry import TARGETS, make_target
from compressor.formats.errors import MissingError, UsageError
from compressor.model_zoo import packed_path

FILES = ["zoo:test_resnet-balanced", "zoo:test_vit-balanced", "zoo:resnet18-tiny"]
PAGE = Path(__file__).parents[1] / "docs" / "deploy.md"


def of_onnx(path: Path) -> Callable[[Any], object]:
    """Returns what computes logits by ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.numpy()})


def of_openvino(path: Path) -> Callable[[Any], object]:
    """Returns what computes logits by OpenVINO in float32."""
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.compile_model(path, "CPU", options)
    return lambda images: compiled(images.numpy())


RUNNERS: dict[str, Callable[[Path], Callable[[Any], object]]] = {
    "torch": lambda path: torch.export.load(path).module(),
    "onnx": of_onnx,
    "openvino": of_openvino,
}
"""How the file of a target is run."""

NOT_RUN = ("coreml",)
"""Targets whose files hold a model that only another machine runs."""


def installed() -> list[str]:
    """Returns the targets that hold models, and whose packages are here."""
    found = []
    for name in sorted([*RUNNERS, *NOT_RUN]):
        try:
            make_target(name, {})
        except MissingError:
            continue
        found.append(name)
    return found


def estimated(packed: Path) -> dict[str, int]:
    """Returns the bytes by the coders of targets that write no file, as far as these are here."""
    found = {}
    for name in TARGETS:
        with contextlib.suppress(MissingError, UsageError):
            found[name] = estimate(packed, name).total.per_tensor
    return found


def measure(file: str, repeat: int, folder: Path) -> list[list[str]]:
    """Exports one file to all targets, and returns a row for each form of it."""
    packed = packed_path(file)
    names = installed()
    done: dict[str, Exported] = {
        name: compressor.export(packed, name, folder / make_target(name, {}).file_name(packed.stem)) for name in names
    }
    loaded = {mode: compressor.load(packed, weights=mode) for mode in ("dense", "packed")}
    models: dict[str, Callable[[Any], object]] = {**loaded}
    models |= {name: RUNNERS[name](done[name].path) for name in names if name in RUNNERS}
    shape = image_shape(loaded["dense"])
    assert shape is not None  # it is a timm model
    images, times = torch.randn(1, *shape), {name: list[float]() for name in models}
    with torch.inference_mode():
        for turn in range(repeat + 1):
            for name, model in models.items():
                taken = seconds(lambda run=model: run(images))  # type: ignore[misc]
                times[name] += [taken] if turn else []
    first = done[names[0]]
    sizes = {"dense": first.dense, "packed": first.packed, **{name: done[name].exported for name in names}}
    sizes |= estimated(packed)
    latency = {name: f"{1e3 * statistics.median(taken):.1f}" for name, taken in times.items()}
    cells = [[f"{size:,}", f"{100 * size / first.dense:.1f} %", latency.get(name, "")] for name, size in sizes.items()]
    return [[packed.stem, name, *row] for name, row in zip(sizes, cells, strict=True)]


def main() -> None:
    """Prints the table, and puts it into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=FILES)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for file in options.files:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(file, options.repeat, Path(folder))
    heads = ["checkpoint", "form", "bytes", "of dense", "ms for an image"]
    table = tabulate(
        rows, heads, tablefmt="github", colalign=("left", "left", "right", "right", "right"), disable_numparse=True
    )
    print(table)
    marked = re.compile(r"(<!-- exports -->\n).*?(<!-- end -->)", re.DOTALL)
    PAGE.write_text(marked.sub(lambda m: f"{m[1]}{table}\n{m[2]}", PAGE.read_text()))


if __name__ == "__main__":
    main()
