"""Our files beside those of other tools: equal dense weights, epochs, images and distillation, bytes of whole files.

    OMP_NUM_THREADS=1 python benchmarks/peers.py --dense FOLDER [--minutes 30] [--method DKM]

DKM (coremltools) and clustering (TensorFlow Model Optimization) share weights while they train, as ours do. NNCodec,
coremltools' palettes and torchao compress what has been trained, so they get the dense network trained further for as
many epochs. All see the same images in the same order, half distilled from the dense network. Each tool is installed in
an environment of its own (in ``--peer-env``), which is removed at the end unless ``--keep-env`` is given. Each row is
appended to ``results/peers.jsonl`` as soon as it is measured and is not measured again, so the run can be cut into
slices; ``results_page.py`` makes the pages of the rows. The test images are used once a row.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import click
import torch
from coremltools_peer import CoreMLTools
from fashion_mnist import BATCH, DISTILL, LR, train_dense
from nncodec_peer import NNCodec
from peer_environment import Coded, default_folder
from post_training import Bench, args, sizes
from safetensors.torch import load_file, save_file
from tfmot_peer import TFMOT
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torchao_peer import TorchAO

from compressor import Compressor, Policy, Rule
from compressor.data.splits import ArraySplit
from compressor.lifecycle.packed import Packed
from compressor.training.distillation import distillation
from compressor.training.evaluation import evaluate

RESULTS = Path(__file__).parent / "results" / "peers.jsonl"
NETS = "test_resnet", "mobilenetv3_small_050"
EPOCHS, IMAGES, TEMPERATURE = 2, 55_000, 2.0
QPS = -32, -28, -24, -20, -16  # step sizes of NNCodec; 4 more are twice the step
SETTINGS: dict[str, tuple[int, ...]] = {  # bits, unless the comment says otherwise
    "dense": (0,),
    "dense, trained on": (0,),
    "learnt": (2, 4, 3),
    "to a size": (24_000, 40_000, 16_000),  # bytes of the file of test_resnet
    "Deep Compression": (90, 80),  # per cent of zeros
    "NNCodec": QPS,
    "palettes": (2, 4, 3, 6),
    "palettes of 8 channels": (2, 4, 3),
    "torchao": (8, 4),
    "DKM": (2, 4, 3),
    "TFMOT": (4, 16, 32),  # clusters
}
TARGETS = {"mobilenetv3_small_050": (45_000, 100_000, 28_000)}
RATES = {**LR, "mobilenetv3_small_050": 1e-3}  # of the zoo
PRICED = 3  # times the learning rate is what shared weights learn at where a bit has a price: so all learn alike
PALETTES = {"palettes": "tensor", "palettes of 8 channels": "groups"}  # as coremltools_peer.py calls them
ONLY_SMALL = "DKM", "TFMOT"  # DKM takes minutes a batch for depthwise layers; TFMOT refuses to cluster those


@dataclass(frozen=True)
class Run:
    """One row: a network, a method of ``SETTINGS`` with one of its settings, a seed, and how long it is trained."""

    net: str
    method: str
    setting: int
    seed: int = 0
    epochs: int = EPOCHS
    images: int = IMAGES


NAMES = [field.name for field in fields(Run)]


@dataclass(frozen=True)
class Peers:
    """The tools, each in an environment that is made when it is first needed."""

    nncodec: NNCodec
    coremltools: CoreMLTools
    torchao: TorchAO
    tfmot: TFMOT

    @classmethod
    def of(cls, folder: Path, keep: bool) -> Peers:
        """Returns the tools, whose environments are in a folder."""
        return cls(NNCodec(folder, keep), CoreMLTools(folder, keep), TorchAO(folder, keep), TFMOT(folder, keep))

    def close(self) -> None:
        """Removes coded files, and environments that are not kept."""
        for peer in (self.nncodec, self.coremltools, self.torchao, self.tfmot):
            peer.close()


def runs() -> Iterator[Run]:
    """Yields all rows, one of each method, then the next of each."""
    for net in NETS:
        settings = {**SETTINGS, "to a size": TARGETS.get(net, SETTINGS["to a size"])}
        for place in range(max(map(len, settings.values()))):
            for method, values in settings.items():
                if place < len(values) and (net == NETS[0] or method not in ONLY_SMALL):
                    yield Run(net, method, values[place])


class Comparison:
    """Measures rows.

    Args:
        bench: the data and the dense networks.
        peers: the tools.
        folder: where dense networks that have been trained further are kept.
    """

    def __init__(self, bench: Bench, peers: Peers, folder: Path) -> None:
        self.bench, self.peers, self.folder = bench, peers, folder

    def measure(self, run: Run) -> dict[str, Any]:
        """Returns one row."""
        torch.manual_seed(run.seed)
        sharing = {"learnt": self.learnt, "to a size": self.to_size, "Deep Compression": self.deep_compression}
        start, weights = time.process_time(), self.bench.weights(run.net)
        row: dict[str, Any] = {"dense_file": weights.stat().st_size}
        if run.method in sharing:
            model, packed = sharing[run.method](run)
            row |= sizes(packed) | {"cpu_seconds": round(time.process_time() - start)}
            if run.method == "Deep Compression":
                row["file"] = packed.report("huffman").totals.file  # as it is published
        elif run.method.startswith("dense"):
            model = self.bench.dense(run.net)
            if run.method != "dense":
                model.load_state_dict(load_file(self.trained_on(run)))
            row |= {"file": row["dense_file"], "cpu_seconds": round(time.process_time() - start)}
        else:
            coded, model = self.coded(run), self.bench.dense(run.net)
            model.load_state_dict(model.state_dict() | coded.state)
            row |= {"file": coded.size, "cpu_seconds": round(coded.seconds)}
        validation = evaluate(model, self.bench.data.eval_loader(256, "validation")).top1
        return row | {"validation": validation} | self.bench.test(model)

    def job(self, run: Run, rules: list[Rule] | None, model: nn.Module | None = None, **options: Any) -> Compressor:
        """Returns a job of ours on a network, which distils from the dense one."""
        teacher = self.bench.dense(run.net)
        return Compressor(
            model or copy.deepcopy(teacher), None if rules is None else Policy(rules), model_args=args(run.net),
            teacher=teacher, distill=DISTILL, temperature=TEMPERATURE, seed=run.seed, **options,
        )  # fmt: skip

    def tuned(self, run: Run, job: Compressor, epochs: int, slower: float = 1) -> None:
        """Trains a prepared job of ours, at a learning rate that is so many times lower."""
        job.finetune(self.batches(run), epochs=epochs, lr=RATES[run.net] / slower)

    def learnt(self, run: Run) -> tuple[nn.Module, Packed]:
        """Shares 2^setting values a tensor."""
        job = self.job(run, [Rule("*", "learnt", bits=run.setting)]).prepare()
        self.tuned(run, job, run.epochs)
        packed = job.finish(half_untouched=True)
        return job.model, packed

    def to_size(self, run: Run) -> tuple[nn.Module, Packed]:
        """Shares values so that the file has a size."""
        job = self.job(run, None, target_size=run.setting).prepare(calibration=self.bench.images(run.seed))
        self.tuned(run, job, run.epochs, PRICED)
        packed = job.finish(half_untouched=True)
        return job.model, packed

    def deep_compression(self, run: Run) -> tuple[nn.Module, Packed]:
        """Prunes for half of the epochs, clusters, and trains the centres for the other half; coded by Huffman."""
        pruning = Rule("*", "dense", sparsity=run.setting / 100, sparsity_by=0.5)
        first = self.job(run, [pruning]).prepare()
        self.tuned(run, first, run.epochs // 2)
        first.finish()
        rules = [Rule("*", "kmeans", types=["Linear"], bits=5), Rule("*", "kmeans", bits=8)]
        second = self.job(run, rules, first.model, preserve_sparsity=True).prepare()
        self.tuned(run, second, run.epochs - run.epochs // 2)
        packed = second.finish(half_untouched=True)
        return second.model, packed

    def coded(self, run: Run) -> Coded:
        """Returns a row's network as another tool has coded it."""
        peers, settings = self.peers, list(SETTINGS[run.method])
        if run.method == "DKM":
            start = self.bench.weights(run.net)
            return peers.coremltools.trained(run.net, args(run.net), start, run.setting, self.training(run))
        if run.method == "TFMOT":
            return peers.tfmot.trained(self.bench.dense(run.net), run.net, run.setting, self.training(run))
        what = run.net, args(run.net), self.trained_on(run)
        if run.method == "NNCodec":
            return peers.nncodec.coded(*what, run.setting, settings, [])
        if run.method == "torchao":
            return peers.torchao.coded(*what, run.setting, settings)
        return peers.coremltools.coded(*what, PALETTES[run.method], run.setting, settings)

    def batches(self, run: Run) -> DataLoader[Any]:
        """Returns the training batches of a row."""
        train = copy.copy(self.bench.data.train)
        assert isinstance(train, ArraySplit)
        train.images, train.labels = train.images[: run.images], train.labels[: run.images]
        return replace(self.bench.data, train=train).train_loader(BATCH, run.seed)

    def trained_on(self, run: Run) -> Path:
        """Returns the file of the dense network trained further, which distils from itself; it is trained once."""
        path = self.folder / f"{run.net}-{run.epochs}x{run.images}-seed{run.seed}.safetensors"
        if not path.exists():
            model, teacher = self.bench.dense(run.net), self.bench.dense(run.net).requires_grad_(False)

            def loss(output: Tensor, target: Tensor, inputs: Tensor) -> Tensor:
                task = functional.cross_entropy(output, target)
                return (1 - DISTILL) * task + DISTILL * distillation(output, teacher(inputs), TEMPERATURE)

            train_dense(model, self.batches(run), loss, RATES[run.net], run.epochs, run.seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(model.state_dict(), path)
        return path

    def training(self, run: Run) -> dict[str, Any]:
        """Returns how another tool is to train; the file has the batches of all epochs and the teacher's answers."""
        path = Path(self.bench.scratch.name) / f"{run.net}-{run.seed}-batches.safetensors"
        if not path.exists():
            torch.manual_seed(run.seed)
            teacher, loader, epochs = self.bench.dense(run.net), self.batches(run), []
            for _ in range(run.epochs):
                epochs += [(images, labels, answers(teacher, images)) for images, labels in loader]
            images, labels, logits = (torch.cat(parts) for parts in zip(*epochs, strict=True))
            save_file({"images": images, "labels": labels, "logits": logits}, path)
        return {
            "batches": str(path), "batch": BATCH, "epochs": run.epochs, "lr": RATES[run.net], "distill": DISTILL,
            "temperature": TEMPERATURE,
        }  # fmt: skip


@torch.no_grad()
def answers(teacher: nn.Module, images: Tensor) -> Tensor:
    """Returns the logits of a network."""
    logits: Tensor = teacher(images)
    return logits


@click.command()
@click.option("--dense", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder of dense weights.")
@click.option("--minutes", default=float("inf"), help="Start no further row after this many minutes.")
@click.option("--net", type=click.Choice(NETS), help="Only rows of this network.")
@click.option("--method", type=click.Choice(list(SETTINGS)), multiple=True, help="Only these methods.")
@click.option(
    "--peer-env", type=click.Path(path_type=Path), default=default_folder(), help="Folder of the peers' environments."
)
@click.option("--keep-env", is_flag=True, help="Leave the environments there.")
def main(
    dense: Path | None, minutes: float, net: str | None, method: tuple[str, ...], peer_env: Path, keep_env: bool
) -> None:
    """Measures the rows that are missing."""
    torch.set_num_threads(1)
    end, peers = time.perf_counter() + 60 * minutes, Peers.of(peer_env, keep_env)
    RESULTS.touch()
    done = {tuple(row[name] for name in NAMES) for row in map(json.loads, RESULTS.read_text().splitlines())}
    try:
        comparison = Comparison(Bench(dense, peers.nncodec), peers, peer_env)
        for run in runs():
            chosen = net in (None, run.net) and (not method or run.method in method)
            if not chosen or tuple(asdict(run).values()) in done:
                continue
            if time.perf_counter() > end:
                print("time is up: call again for the rest")
                break
            row = asdict(run) | comparison.measure(run)
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)
    finally:
        peers.close()


if __name__ == "__main__":
    main()
