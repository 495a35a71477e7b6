"""The packed checkpoints of ``model_zoo``: trained on Fashion-MNIST by ``compress``, measured, and put in the index.

    python benchmarks/zoo.py [--dense FOLDER] [--minutes 10] [--folder model_zoo]

A checkpoint that the index has, written by the same command, is left as it is, so the run can be cut into slices of
one checkpoint each. ``--dense`` names a folder with trained ``MODEL-fashion-mnist.safetensors``; without it
``compress`` trains the dense networks first, which takes far longer and gives other files. ``README.md`` between the
markers is rewritten from the index, unless the index is in another folder.
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
from compressor.training.evaluation import evaluate

HERE = Path(__file__).parent
ZOO = HERE.parent / "model_zoo"
SLICE = HERE.parent / "tests" / "data" / "fashion-mnist-200.safetensors"
DATASET, SEED = "fashion-mnist", 0
PLANS = {  # model, recipe, its training
    "test_resnet-balanced": ("test_resnet", "learnt4", "--epochs 2 --lr 0.001"),
    "test_resnet-tiny": ("test_resnet", "tiny90", "--epochs 2 --lr 0.001"),
    "test_vit-balanced": ("test_vit", "learnt4", "--epochs 2 --lr 0.0005"),
    "mobilenetv3_small_050-balanced": ("mobilenetv3_small_050", "learnt4", "--epochs 1 --lr 0.001"),
    "resnet18-tiny": ("resnet18", "tiny97", "--epochs 3 --lr 0.0005"),
    "resnet18-balanced": ("resnet18", "sparse90", "--epochs 1 --lr 0.0003"),
}
HEAD = """\
# The packed checkpoints that ship with the package: what each is, and the command that wrote it.
# Written by benchmarks/zoo.py; benchmarks/README.md says more. Accuracies are shares of n test images.
"""


def weights_of(name: str) -> str:
    """Give the name of the file of dense weights."""
    return f"{PLANS[name][0]}-{DATASET}.safetensors"


def words(name: str, weights: Path | str | None, output: Path | str) -> list[str]:
    """Give the words of the command that writes a checkpoint."""
    model, recipe, training = PLANS[name]
    given = [] if weights is None else ["--checkpoint-path", str(weights)]
    options = [*training.split(), "--batch-size", "128", "--untouched", "f16", "--seed", str(SEED)]
    return [model, "--dataset", DATASET, *given, "--recipe", recipe, *options, "-o", str(output)]


def command(name: str, dense: Path | None) -> str:
    """Give the command as the index tells it, without the folders of this machine."""
    return " ".join(["compress", *words(name, weights_of(name) if dense else None, f"{name}.safetensors")])


def sha256(path: Path) -> str:
    """Hash a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def measure(name: str, dense: Path | None, path: Path, data: Dataset) -> dict[str, Any]:
    """Reload a checkpoint that was written, and give its entry of the index."""
    result = evaluate(compressor.load(path), data.eval_loader(256, "test"))
    with PackedFile.open(path) as file:
        made = read_provenance(file)
    if made.top1 is None or made.top1.packed != result.top1 or made.seed != SEED:
        raise SystemExit(f"{path}: measured {result.top1}, the file says {made.top1} with seed {made.seed}")
    model, recipe, _ = PLANS[name]
    return {
        "model": model,
        "dataset": DATASET,
        "recipe": recipe,
        "seed": SEED,
        "command": command(name, dense),
        "dense_sha256": sha256(dense / weights_of(name)) if dense else "",
        "sha256": sha256(path),
        "bytes": path.stat().st_size,
        "parameters": made.parameters,
        "dense_top1": made.top1.dense,
        "top1": result.top1,
        "interval": [round(end, 5) for end in result.interval],
        "n": result.n,
        "correct_of_first_200": int(result.correct[:200].sum()),
    }


def write_index(index: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Write all entries, sorted by name; JSON's numbers, strings and lists are TOML's too."""
    tables = [
        f"\n[checkpoint.{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in entries[name].items())
        for name in sorted(entries)
    ]
    index.write_text(HEAD + "".join(tables), encoding="utf-8")


def write_slice(data: Dataset) -> None:
    """Keep the first 200 test images for the tests, as they are."""
    if not SLICE.exists():
        SLICE.parent.mkdir(exist_ok=True)
        images, labels = data.test.images[:200, 0], data.test.labels[:200].byte()  # type: ignore[union-attr]
        SLICE.write_bytes(save({"images": images.contiguous(), "labels": labels}))


def table(entries: dict[str, dict[str, Any]]) -> str:
    """Lay the index out as Markdown."""
    lines = [
        "| checkpoint | recipe | parameters | file bytes | bits/weight | dense % | top-1 % (n = 10,000) | 95 % |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, facts in sorted(entries.items()):
        entry = Checkpoint(**{"name": name, **facts})
        low, high = (f"{100 * end:.2f}" for end in entry.interval)
        lines.append(
            f"| {name} | {entry.recipe} | {entry.parameters:,} | {entry.bytes:,} "
            f"| {entry.bits_per_weight:.2f} | {100 * entry.dense_top1:.2f} | {100 * entry.top1:.2f} | [{low}, {high}] |"
        )
    return "\n".join(lines)


@click.command()
@click.option("--dense", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder of dense weights.")
@click.option("--minutes", default=float("inf"), help="Start no further checkpoint after so many minutes.")
@click.option("--folder", type=click.Path(path_type=Path), default=ZOO, help="Where index.toml and checkpoints/ are.")
@click.option("--name", type=click.Choice(list(PLANS)), help="Only this checkpoint.")
@click.option("--device", help="Where to train. [default: the fastest there is]")
def main(dense: Path | None, minutes: float, folder: Path, name: str | None, device: str | None) -> None:
    """Write the checkpoints that are missing, and the index."""
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
        if code := run([*words(plan, dense / weights_of(plan) if dense else None, path), *where, "--force"]):
            raise SystemExit(code)
        path.with_name(f"{path.name}.summary.csv").unlink(missing_ok=True)
        entries[plan] = measure(plan, dense, path, data)
        write_index(index, entries)
    if folder.resolve() == ZOO.resolve():
        put("zoo", table(entries))


if __name__ == "__main__":
    main()
