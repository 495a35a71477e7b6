"""Post-training compression against its peers: bytes at equal top-1, with images, without any, and of weights alone.

    OMP_NUM_THREADS=1 python benchmarks/post_training.py --dense FOLDER [--minutes 30]

Nothing is trained. Each row is appended to ``results/post_training.jsonl`` as soon as it is measured and is not
measured again, so the run can be cut into slices. The tables between the markers of ``README.md`` are rewritten from
all rows, and ``docs/figures/post_training.png`` is drawn where there is matplotlib (extra ``report``). The test images
are used once per row. NNCodec and coremltools are installed in environments of their own (in ``--peer-env``, by default
``~/.cache/timm-compressor``), which are removed at the end unless ``--keep-env`` is given.
"""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import timm
import torch
from coremltools_peer import PALETTES, CoreMLTools
from nncodec_peer import NNCodec
from page import put
from peer_environment import Coded, default_folder
from post_training_page import draw, tables
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressor import Compressor, Policy, Rule, load
from compressor.data.datasets import load_data
from compressor.data.splits import ArraySplit
from compressor.lifecycle.packed import Packed
from compressor.models.baseline import train_baseline
from compressor.training.evaluation import Evaluation, evaluate

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "post_training.jsonl"
FIGURE = HERE.parent / "docs" / "figures" / "post_training.png"
NETS = "test_resnet", "mobilenetv3_small_050", "test_vit", "resnet18"
IMAGES = 256
QPS = range(-40, -14, 2)  # step sizes of NNCodec; 4 more are twice the step
WEIGHT_QPS = range(-48, -8, 4)
PALETTE_BITS = 2, 3, 4, 6, 8  # of an index of coremltools
PRICES = {  # from the dense accuracy down to about 99 % of it, on the last 5,000 training images
    "test_resnet": (1e-8, 2.5e-8, 6e-8, 1.6e-7, 4e-7, 1e-6),
    "mobilenetv3_small_050": (1e-8, 2.5e-8, 6e-8, 1.6e-7, 4e-7, 1e-6),
    "test_vit": (4e-9, 1e-8, 2.5e-8, 6e-8, 1.6e-7, 4e-7),
    "resnet18": (4e-10, 1e-9, 2.5e-9, 6e-9, 1.6e-8, 4e-8),
}
WEIGHT_PRICES = tuple(math.log(2) / 12 * 4.0**-k for k in range(3, 12))  # steps of 1/8 to 1/2048
TARGETS = {"test_resnet": 50_000, "resnet18": 330_000}
FIXED = {"kmeans": 4, "inq": 5}  # bits of the schemes that have no price
GRANULARITY = {  # bits of an index of each granularity of ``kmeans``, with images
    "kmeans": (2, 3),
    "kmeans group_size=8": (2, 3),
    "kmeans channel_scale=true": (2, 3),
    "kmeans vector=2": (4, 6),
    "kmeans vector=4": (6, 8),
    "kmeans vector=8": (8,),
}
OF_GRANULARITY = "test_resnet", "test_vit", "resnet18"
PACKED_ALONE = {"packing, kmeans": 4, "packing, target bits": 2}  # without data, for time and memory


@dataclass(frozen=True)
class Run:
    """One row.

    Args:
        net: the network.
        method: see ``runs``.
        setting: the step size, price, target in bytes, or bits.
        seed: of the draw of the calibration images.
    """

    net: str
    method: str
    setting: float
    seed: int = 0


def runs() -> Iterator[Run]:
    """Yields all rows, network by network, those of granularities, of the targets and of further seeds last."""
    for net in NETS:
        yield Run(net, "dense", 0)
        yield from (Run(net, "nncodec", qp) for qp in QPS)
        yield from (Run(net, "nncodec, weights alone", qp) for qp in WEIGHT_QPS)
        yield from (Run(net, f"coremltools, {palette}", bits) for palette in PALETTES for bits in PALETTE_BITS)
        yield from (Run(net, "weights alone", price) for price in WEIGHT_PRICES)
        yield from (Run(net, "images", price) for price in PRICES[net])
        coarser = (factor * PRICES[net][-1] for factor in (2.5, 6.0))  # made images show less curvature
        yield from (Run(net, "synthetic", price) for price in (*PRICES[net], *coarser))
        for scheme, bits in FIXED.items():
            yield from (Run(net, method, bits) for method in (scheme, f"{scheme}, images"))
    for net in OF_GRANULARITY:
        yield from (Run(net, f"{scheme}, images", size) for scheme, bits in GRANULARITY.items() for size in bits)
    for net, size in TARGETS.items():
        yield Run(net, "target", size)
        yield from (Run(net, method, bits) for method, bits in PACKED_ALONE.items())
    for net in NETS[:-1]:
        yield from (Run(net, "images", price, seed) for seed in (1, 2) for price in PRICES[net])


class Bench:
    """The data, the dense networks and the peers.

    Args:
        dense: the folder of dense weights; None trains the dense networks when they are first needed.
        peer: NNCodec.
        palettes: coremltools; None: no row of it is going to be measured.
    """

    def __init__(self, dense: Path | None, peer: NNCodec, palettes: CoreMLTools | None = None) -> None:
        self.folder, self.peer, self.palettes = dense, peer, palettes
        self.data = load_data("fashion-mnist")
        self.scratch = tempfile.TemporaryDirectory()

    def weights(self, net: str) -> Path:
        """Returns the file of a dense network, from the folder or trained here."""
        path = (self.folder or Path(self.scratch.name)) / f"{net}-fashion-mnist.safetensors"
        if not path.exists() and self.folder is None:
            save_file(dict(train_baseline(net, args(net), self.data, seed=0).state), path)
        return path

    def dense(self, net: str) -> nn.Module:
        """Returns the dense network, in eval mode, which says for images of which size it was trained."""
        model = timm.create_model(net, **args(net))
        model.load_state_dict(load_file(self.weights(net)))
        cfg: Any = model.pretrained_cfg
        cfg["input_size"] = self.data.input_size  # not that of timm's weights, 160 or 224 pixels
        return model.eval()

    def images(self, seed: int) -> Tensor:
        """Returns training images drawn at random, without augmentation and without labels."""
        split = copy.copy(self.data.train)
        assert isinstance(split, ArraySplit)
        split.shift, split.flip = 0, False
        chosen = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))[:IMAGES]
        return split.__getitems__(chosen.tolist())[0]

    def test(self, model: nn.Module) -> dict[str, Any]:
        """Returns top-1 on the test images."""
        result: Evaluation = evaluate(model, self.data.eval_loader(256, "test"))
        return {"top1": result.top1, "interval": result.interval, "n": result.n}

    def measure(self, run: Run) -> dict[str, Any]:
        """Returns one row."""
        torch.manual_seed(run.seed)
        if run.method == "dense":
            return {"file": self.weights(run.net).stat().st_size, **self.test(self.dense(run.net))}
        if run.method.startswith("nncodec"):
            return self.nncodec(run)
        if run.method.startswith("coremltools"):
            return self.coremltools(run)
        if run.method == "target" or run.method in PACKED_ALONE:
            return self.alone(run)
        return self.ours(run)

    def nncodec(self, run: Run) -> dict[str, Any]:
        """Returns a row of NNCodec, of the whole network or of the tensors alone that our schemes share."""
        model, alone = self.dense(run.net), run.method != "nncodec"
        only = [site.name for site in Compressor(model, share("kmeans", 4), teacher=None).sites] if alone else []
        qps = list(WEIGHT_QPS if alone else QPS)
        coded = self.peer.coded(run.net, args(run.net), self.weights(run.net), int(run.setting), qps, only)
        row = {"file": coded.size, "cpu_seconds": round(coded.seconds, 2)}
        if alone:
            return row | compare(model.state_dict(), coded.state, only)
        return row | self.decoded(model, coded)

    def coremltools(self, run: Run) -> dict[str, Any]:
        """Returns a row of coremltools."""
        assert self.palettes is not None
        palette = run.method.partition(", ")[2]
        weights, bits = self.weights(run.net), int(run.setting)
        coded = self.palettes.coded(run.net, args(run.net), weights, palette, bits, list(PALETTE_BITS))
        row = {"file": coded.size, "cpu_seconds": round(coded.seconds, 2)}
        return row | self.decoded(self.dense(run.net), coded)

    def decoded(self, model: nn.Module, coded: Coded) -> dict[str, Any]:
        """Returns top-1 of a network with the tensors that come out of a peer."""
        model.load_state_dict(model.state_dict() | coded.state)
        return self.test(model)

    def ours(self, run: Run) -> dict[str, Any]:
        """Returns a row of a price, or of a scheme that has none."""
        model, start = self.dense(run.net), time.process_time()
        scheme, _, source = run.method.partition(", ")
        if scheme in FIXED or scheme in GRANULARITY:
            job = Compressor(model, share(scheme, run.setting), model_args=args(run.net), teacher=None)
        else:
            job = Compressor(model, rate=run.setting, model_args=args(run.net), teacher=None)
            source = run.method
        sources: dict[str, Any] = {"images": self.images(run.seed), "synthetic": "synthetic"}
        fold = run.method in ("images", "synthetic")
        packed = job.prepare(calibration=sources.get(source)).finish(half_untouched=True, fold_norms=fold)
        row = {"cpu_seconds": round(time.process_time() - start, 2), **sizes(packed)}
        if run.method == "weights alone":
            return row | compare(model.state_dict(), job.model.state_dict(), [site.name for site in job.sites])
        return row | self.test(job.model)

    def alone(self, run: Run) -> dict[str, Any]:
        """Returns a row whose time and memory are measured, in a new process."""
        with tempfile.TemporaryDirectory() as folder:
            weights, images, path = (Path(folder) / f"{name}.safetensors" for name in ("dense", "images", "packed"))
            save_file(self.dense(run.net).state_dict(), weights)
            save_file({"images": self.images(run.seed)}, images)
            job = {"run": asdict(run), "weights": str(weights), "images": str(images), "path": str(path)}
            command = [sys.executable, __file__, "--alone", json.dumps(job)]
            printed = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
            return {**json.loads(printed.splitlines()[-1]), "file": path.stat().st_size, **self.test(load(path))}


def args(net: str) -> dict[str, Any]:
    """Returns the arguments of ``timm.create_model``."""
    return {"num_classes": 10, "in_chans": 1, **({"img_size": 32} if net == "test_vit" else {})}


def share(scheme: str, bits: float) -> Policy:
    """Returns the policy that shares every Linear and Conv weight by a scheme, with indices of so many bits.

    Args:
        scheme: its id, and then settings, such as ``kmeans vector=2``.
        bits: of an index.
    """
    name, *settings = scheme.split()
    return Policy([Rule("*", scheme=name, bits=int(bits), **tomllib.loads("\n".join(settings)))])


def sizes(packed: Packed) -> dict[str, Any]:
    """Returns the bytes of a packed network, and the number of its shared weights."""
    report = packed.report()
    totals, weights = report.totals, sum(row.weights for row in report.rows)
    coded = {"coded": totals.indices + totals.codebooks}
    return {"weights": weights, "file": totals.file, **coded, "untouched": totals.untouched, "header": totals.header}


def compare(dense: dict[str, Tensor], coded: dict[str, Tensor], names: list[str]) -> dict[str, Any]:
    """Returns the signal-to-noise ratio in decibels over all tensors named, and the number of their weights."""
    signal = sum(float(dense[name].double().square().sum()) for name in names)
    noise = sum(float((dense[name].double() - coded[name].double()).square().sum()) for name in names)
    return {"sqnr": 10 * math.log10(signal / noise), "weights": sum(dense[name].numel() for name in names)}


def compress_alone(run: Run, weights: str, images: str, path: str) -> None:
    """Compresses a network, and prints what it took: this process does nothing else."""
    model, calibration = timm.create_model(run.net, **args(run.net)), load_file(images)["images"]
    model.load_state_dict(load_file(weights))
    if run.method == "packing, kmeans":
        settings: dict[str, Any] = {"policy": share("kmeans", run.setting)}
    elif run.method == "packing, target bits":
        settings = {"target_bits": run.setting}
    else:
        settings = {"target_size": int(run.setting)}
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # resets the highest resident size
    before, start, cpu = resident(status, "VmRSS"), time.perf_counter(), time.process_time()
    job = Compressor(model.eval(), model_args=args(run.net), teacher=None, **settings)
    job.prepare(calibration=calibration if run.method == "target" else None).finish(half_untouched=True).save(path)
    row: dict[str, Any] = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    row |= {"peak": resident(status, "VmHWM") - before}
    if job.search is not None:
        row |= {"price": job.search.rate, "passes": job.search.passes, "predicted": job.search.size}
    print(json.dumps(row))


def resident(status: Path, name: str) -> int:
    """Returns a resident size of this process in bytes (Linux only)."""
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


@click.command()
@click.option("--dense", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder of dense weights.")
@click.option("--minutes", default=float("inf"), help="Start no further row after this many minutes.")
@click.option("--net", type=click.Choice(NETS), help="Only rows of this network.")
@click.option("--method", help="Only this method.")
@click.option(
    "--peer-env", type=click.Path(path_type=Path), default=default_folder(), help="Folder of the peers' environments."
)
@click.option("--keep-env", is_flag=True, help="Leave the environments there.")
@click.option("--alone", hidden=True)
def main(
    dense: Path | None,
    minutes: float,
    net: str | None,
    method: str | None,
    peer_env: Path,
    keep_env: bool,
    alone: str | None,
) -> None:
    """Measures the rows that are missing, and rewrites tables and figure."""
    torch.set_num_threads(1)
    if alone:
        job = json.loads(alone)
        compress_alone(Run(**job.pop("run")), **job)
        return
    peers = NNCodec(peer_env, keep_env), CoreMLTools(peer_env, keep_env)
    try:
        rows = measure_all(Bench(dense, *peers), net, method, time.perf_counter() + 60 * minutes)
    finally:
        for peer in peers:
            peer.close()
    for name, table in tables(rows).items():
        put(f"post_training {name}", table)
    draw(rows, FIGURE)


def measure_all(bench: Bench, net: str | None, method: str | None, end: float) -> list[dict[str, Any]]:
    """Measures the missing rows until the time is up, and returns all rows."""
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.touch()
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    done = {tuple(row[name] for name in ("net", "method", "setting", "seed")) for row in rows}
    for run in runs():
        wanted = net in (None, run.net) and (method in (None, run.method) or run.method == "dense")
        if not wanted or (run.net, run.method, run.setting, run.seed) in done:
            continue
        if time.perf_counter() > end:
            print("time is up: call again for the rest")
            break
        rows.append({**asdict(run), **bench.measure(run)})
        with RESULTS.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    main()
