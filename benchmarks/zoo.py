"""Trains the packed checkpoints of ``model_zoo`` on Fashion-MNIST by ``compress``, measures and indexes them.

    python benchmarks/zoo.py [--dense FOLDER] [--minutes 10] [--folder model_zoo]

A checkpoint that is in the index and was written by the same command is not trained again, so the run can be cut into
slices of one checkpoint each. ``--dense`` names a folder with trained ``MODEL-fashion-mnist.safetensors``; without it
``compress`` trains the dense networks first, which takes far longer and results in other files. The table between the
markers of ``README.md`` is rewritten from the index, unless ``--folder`` names another folder.
"""

from __future__ import annotations

import hashlib
import json
import time
import tomllib
from pathlib import Path
from typing import Any

import click
from page import put
from safetensors.torch import save

import compressor
from compressor.cli.main import run
from compressor.data.datasets import Dataset, load_data
from compressor.formats.file.reader import PackedFile
from compressor.model_zoo import Checkpoint
from compressor.report.provenance import read_provenance
from compressor.report.report import Report
from compressor.training.evaluation import evaluate

HERE = Path(__file__).parent
ZOO = HERE.parent / "model_zoo"
SLICE = HERE.parent / "tests" / "data" / "fashion-mnist-200.safetensors"
DATASET, SEED = "fashion-mnist", 0
TEACHER = "--teacher resnet18 --teacher-checkpoint resnet18-fashion-mnist.safetensors"
PLANS = {  # model, and how it is compressed
    "test_resnet-balanced": ("test_resnet", "--target-size 50KB --epochs 0"),
    "test_resnet-tiny": ("test_resnet", "--target-size 18KB --epochs 6"),
    "test_vit-balanced": ("test_vit", "--target-size 60KB --epochs 0"),
    "test_vit-tiny": ("test_vit", "--target-size 25KB --epochs 6"),
    "test_vit-student": ("test_vit", f"--target-size 20KB --epochs 6 {TEACHER}"),
    "mobilenetv3_small_050-balanced": ("mobilenetv3_small_050", "--target-size 100KB --epochs 0"),
    "mobilenetv3_small_050-tiny": ("mobilenetv3_small_050", "--target-size 28KB --epochs 6"),
    "resnet18-balanced": ("resnet18", "--target-size 330KB --epochs 0"),
    "resnet18-tiny": ("resnet18", "--target-size 45KB --epochs 6"),
}
HEAD = """\
# The packed checkpoints that ship with the package: what each is, and the command that wrote it.
# Written by benchmarks/zoo.py; benchmarks/README.md says more. Accuracies are shares of n test images.
"""


def weights_of(name: str) -> str:
    """Returns the file name of the dense weights of a checkpoint's model."""
    return f"{PLANS[name][0]}-{DATASET}.safetensors"


def arguments(name: str, folder: Path | None, output: Path | str) -> list[str]:
    """Returns the arguments with which ``compress`` writes a checkpoint.

    Args:
        name: of the checkpoint.
        folder: of the dense weights; None: ``compress`` trains the dense networks, of model and teacher, itself.
        output: where it is written.
    """
    model, options = PLANS[name]
    start = [] if folder is None else ["--checkpoint-path", str(folder / weights_of(name))]
    if folder is None:
        options = options.partition(" --teacher-checkpoint")[0]
    rest = [str(folder / one) if folder and one.endswith(f"-{DATASET}.safetensors") else one for one in options.split()]
    return [model, "--dataset", DATASET, *start, *rest, "--seed", str(SEED), "-o", str(output)]


def command(name: str, dense: Path | None) -> str:
    """Returns the command as the index records it, without the folders of this machine."""
    return " ".join(["compress", *arguments(name, Path() if dense else None, f"{name}.safetensors")])


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def measure(name: str, dense: Path | None, path: Path, data: Dataset) -> dict[str, Any]:
    """Loads a checkpoint that was written, and returns its entry of the index.

    Raises:
        SystemExit: if the accuracy or the seed in the file differs from the measured one.
    """
    result = evaluate(compressor.load(path), data.eval_loader(256, "test"))
    with PackedFile.open(path) as file:
        provenance = read_provenance(file)
    if provenance.top1 is None or provenance.top1.packed != result.top1 or provenance.seed != SEED:
        stated = f"{provenance.top1} with seed {provenance.seed}"
        raise SystemExit(f"{path}: measured {result.top1}, the file says {stated}")
    return {
        "model": PLANS[name][0],
        "dataset": DATASET,
        "seed": SEED,
        "command": command(name, dense),
        "dense_sha256": sha256(dense / weights_of(name)) if dense else "",
        "sha256": sha256(path),
        "bytes": path.stat().st_size,
        "parameters": provenance.parameters,
        "dense_top1": provenance.top1.dense,
        "top1": result.top1,
        "interval": [round(end, 5) for end in result.interval],
        "n": result.n,
        "correct_of_first_200": int(result.correct[:200].sum()),
    }


def write_index(index: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Writes all entries, sorted by name; JSON numbers, strings and lists are valid TOML."""
    tables = [
        f"\n[checkpoint.{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in entries[name].items())
        for name in sorted(entries)
    ]
    index.write_text(HEAD + "".join(tables), encoding="utf-8")


def write_slice(data: Dataset) -> None:
    """Writes the first 200 test images, without normalisation, for the tests."""
    if not SLICE.exists():
        SLICE.parent.mkdir(exist_ok=True)
        images, labels = data.test.images[:200, 0], data.test.labels[:200].byte()  # type: ignore[union-attr]
        SLICE.write_bytes(save({"images": images.contiguous(), "labels": labels}))


def dense_size(name: str) -> int:
    """Returns the bytes of the dense file that a checkpoint of the zoo stands for."""
    with PackedFile.open(ZOO / "checkpoints" / f"{name}.safetensors") as file:
        return Report.of(file).totals.dense


def table(entries: dict[str, dict[str, Any]]) -> str:
    """Returns the index as a Markdown table."""
    lines = [
        "| checkpoint | parameters | bytes | times smaller | bits/weight | dense % | top-1 % (n = 10,000) | 95 % |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, facts in sorted(entries.items()):
        entry = Checkpoint(**{"name": name, **facts})
        low, high = (f"{100 * end:.2f}" for end in entry.interval)
        cells = [name, f"{entry.parameters:,}", f"{entry.bytes:,}", f"{dense_size(name) / entry.bytes:.0f}"]
        cells += [f"{entry.bits_per_weight:.2f}", f"{100 * entry.dense_top1:.2f}", f"{100 * entry.top1:.2f}"]
        lines.append(f"| {' | '.join(cells)} | [{low}, {high}] |")
    return "\n".join(lines)


def short_table(entries: dict[str, dict[str, Any]]) -> str:
    """Returns what each checkpoint gained and lost, the smallest of each model, as a Markdown table."""
    lines = ["| model | dense weights, bytes | packed file, bytes | times smaller | dense % | packed % |"]
    lines.append("|---|--:|--:|--:|--:|--:|")
    for name, facts in sorted(entries.items()):
        if name.endswith("-tiny"):
            entry = Checkpoint(**{"name": name, **facts})
            cells = [entry.model, f"{dense_size(name):,}", f"{entry.bytes:,}", f"{dense_size(name) / entry.bytes:.0f}"]
            lines.append(f"| {' | '.join(cells)} | {100 * entry.dense_top1:.1f} | {100 * entry.top1:.1f} |")
    return "\n".join(lines)


@click.command()
@click.option("--dense", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder of dense weights.")
@click.option("--minutes", default=float("inf"), help="Start no further checkpoint after this many minutes.")
@click.option("--folder", type=click.Path(path_type=Path), default=ZOO, help="Where index.toml and checkpoints/ are.")
@click.option("--name", type=click.Choice(list(PLANS)), help="Only this checkpoint.")
@click.option("--device", help="Where to train. [default: the fastest there is]")
def main(dense: Path | None, minutes: float, folder: Path, name: str | None, device: str | None) -> None:
    """Writes the checkpoints that are missing, and the index."""
    start, data, index = time.perf_counter(), load_data(DATASET), folder / "index.toml"
    entries = tomllib.loads(index.read_text())["checkpoint"] if index.exists() else {}
    write_slice(data)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    for plan in PLANS if name is None else [name]:
        path = folder / "checkpoints" / f"{plan}.safetensors"
        kept = entries.get(plan, {})
        if path.exists() and kept.get("sha256") == sha256(path) and kept["command"] == command(plan, dense):
            continue
        if time.perf_counter() - start > 60 * minutes:
            print("time is up: call again for the rest")
            break
        where = ["--device", device] if device else []
        if code := run([*arguments(plan, dense, path), *where, "--force"]):
            raise SystemExit(code)
        path.with_name(f"{path.name}.summary.csv").unlink(missing_ok=True)
        entries[plan] = measure(plan, dense, path, data)
        write_index(index, entries)
    if folder.resolve() == ZOO.resolve():
        put("zoo", table(entries))
        put("zoo", short_table(entries), HERE.parent / "README.md")


if __name__ == "__main__":
    main()
