"""``compress eval``: the accuracy of a packed file, on the images that it is for, or on others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compressor.cli.click_options import click_options, from_values
from compressor.cli.data import say_data, say_images
from compressor.cli.files import EVAL_BATCH, PackedPath, in_bytes, memory_option, open_packed, packed_file
from compressor.cli.preprocessing import NumbersCommand, PreprocessingConfig
from compressor.cli.show import accuracy_line, class_rows, echo, percent, print_json, print_table
from compressor.cli.values import WholeNumber
from compressor.formats.errors import MissingError, UsageError
from compressor.formats.io.hub import pinned_name

if TYPE_CHECKING:
    from torch import nn

    from compressor.data.datasets import Dataset
    from compressor.report.provenance import Provenance
    from compressor.training.detailed_evaluation import DetailedEvaluation

__all__ = ["evaluate"]


@click.command("eval", cls=NumbersCommand)
@packed_file
@click.option("--dataset", help="Data set; by default the built-in one that the file was made with.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Folder of its files.")
@click.option("--batch-size", type=WholeNumber(1), default=EVAL_BATCH, show_default=True)
@click.option("--device", help="cpu, cuda, cuda:1, mps ...  [default: a GPU if there is one]")
@click.option("--max-bad-images", metavar="N", type=WholeNumber(0), default=0, show_default=True,
              help="Images that may be unreadable; all are listed in bad_images.txt.")  # fmt: skip
@click.option("--against", type=PackedPath(path_type=Path), metavar="DENSE",
              help="Measure these weights of the same model, too: a checkpoint, or another packed file.")  # fmt: skip
@click.option("--per-class", is_flag=True, help="Show the accuracy of each class.")
@memory_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead.")
def evaluate(
    file: Path,
    dataset: str | None,
    data_dir: Path | None,
    batch_size: int,
    device: str | None,
    max_bad_images: int,
    against: Path | None,
    per_class: bool,
    max_memory: int | None,
    as_json: bool,
    **values: Any,
) -> None:
    """Measure top-1, top-5 and loss of a packed FILE.

    Images are prepared as the file says, unless options say otherwise.
    """
    from compressor import load
    from compressor.distributed.devices import find_device
    from compressor.report.provenance import read_provenance
    from compressor.training.detailed_evaluation import measure

    asked = from_values(PreprocessingConfig, values)
    asked.check()
    where = find_device(device)
    with open_packed(file, max_memory) as packed:
        made, preprocessing = read_provenance(packed), dict(packed.preprocessing or {})
        named, content = packed.model, packed.content_sha256()
    in_chans = (named or {"args": {}})["args"].get("in_chans")
    data = _data(file, dataset, data_dir, made, preprocessing, max_bad_images, asked, in_chans)
    model = load(file, max_memory=in_bytes(max_memory))
    _check_head(model, data)
    compared, dense = ("", None) if against is None else _against(against, file, in_bytes(max_memory))
    say_data(data, data_dir)
    say_images(data.preprocessing)
    loader = data.eval_loader(batch_size)
    before = None if dense is None else measure(dense.to(where), loader)
    found = Found(file, content, named, data, made, measure(model.to(where), loader), before, compared)
    if as_json:
        print_json(found.to_json(per_class))
    else:
        found.show(per_class)


# The options of images are those of every command that reads some.
evaluate.params[3:3] = click_options(PreprocessingConfig)


@dataclass(frozen=True, eq=False)
class Found:
    """What was measured of a packed file.

    Args:
        file: the packed file.
        content: the SHA-256 of its content.
        model: name and arguments of its timm model.
        data: what it was measured on.
        made: how the file was made.
        packed: its figures.
        dense: those of the weights to compare with; None without any.
        compared: what these are: "dense", or another packed file.
    """

    file: Path
    content: str
    model: Mapping[str, Any] | None
    data: Dataset
    made: Provenance
    packed: DetailedEvaluation
    dense: DetailedEvaluation | None
    compared: str

    @property
    def recorded(self) -> float | None:
        """The top-1 that the file says it has on the same images; None where it says none."""
        if self.made.data is None or self.made.top1 is None:
            return None
        same = self.made.data.version == self.data.version and self.made.data.split == self.data.evaluated
        return self.made.top1.packed if same else None

    def to_json(self, per_class: bool) -> dict[str, Any]:
        """Returns everything as JSON-ready values."""
        data, result = self.data, self.packed
        low, high = result.interval
        facts = {"name": data.name, "version": data.version, "split": data.evaluated, "n": result.n}
        top1 = {"packed": result.top1, "n": result.n, "low": low, "high": high, "recorded": self.recorded}
        both = {"packed": result} if self.dense is None else {"packed": result, "dense": self.dense}
        more = {} if self.dense is None else {"dense": self.dense.top1}
        return {
            "file": str(self.file),
            "content_sha256": self.content,
            "hub": pinned_name(self.file),
            "model": self.model,
            "data": facts,
            "preprocessing": data.preprocessing,
            "top1": {**top1, **more},
            "top5": {name: one.top5 for name, one in both.items()},
            "loss": {name: one.loss for name, one in both.items()},
            "images_per_second": result.images_per_second,
            **({"classes": self._classes()} if per_class else {}),
        }

    def show(self, per_class: bool) -> None:
        """Prints the figures as text."""
        from compressor.training.detailed_evaluation import TOP

        recorded, result, dense = self.recorded, self.packed, self.dense
        same = {None: "", result.top1: "  as recorded in the file"}
        note = same.get(recorded, f"  recorded in the file: {recorded!r}")
        echo(accuracy_line(result, dense, self.data.evaluated, self.made.seed, self.compared) + note)
        start = f"{self.compared} "
        before = ("", "") if dense is None else (f"{start}{percent(dense.top5)} -> ", f"{start}{dense.loss:.4f} -> ")
        speed = f"{result.images_per_second:,.0f} images/s"
        top5 = f"top-5 {before[0]}{percent(result.top5)}  " if self.data.num_classes > TOP else ""
        echo(f"{top5}loss {before[1]}{result.loss:.4f} nats  {speed}")
        if per_class:
            rows = [
                [row["name"], f"{row['images']:,}", *map(percent, _shares(row)), *_changed(row)]
                for row in self._classes()
            ]
            both = dense is not None
            heads = "class", "images", *([self.compared] * both), "top-1", *(["lost", "gained"] * both)
            print_table([heads, *rows])

    def _classes(self) -> list[dict[str, Any]]:
        return class_rows(self.packed, self.dense, self.data.class_names)


def _shares(row: dict[str, Any]) -> list[float]:
    """Returns the shares of the images of a class that are predicted right, before and after."""
    return [row[key] / row["images"] for key in ("dense", "packed") if key in row]


def _changed(row: dict[str, Any]) -> list[str]:
    """Returns how many images of a class only one of two models gets right."""
    return [f"{row[key]:,}" for key in ("lost", "gained") if key in row]


def _data(
    file: Path,
    dataset: str | None,
    data_dir: Path | None,
    made: Provenance,
    preprocessing: dict[str, Any],
    max_bad_images: int,
    asked: PreprocessingConfig,
    in_chans: int | None = None,
) -> Dataset:
    """Loads the images to measure on, prepared as the file says, or as was asked for."""
    from compressor.cli.model_source import check_fixed
    from compressor.data.bad_images import BadImages
    from compressor.data.built_in import BUILT_IN
    from compressor.data.datasets import load_data
    from compressor.data.preprocessing import resolve_preprocessing

    named = dataset if dataset is not None else ("" if data_dir is not None else None)
    if named is None:
        named = made.data.name if made.data is not None else None
        if named not in BUILT_IN:  # any other name could make timm fetch or run what the author of the file wants
            said = "names no data set" if named is None else f"was measured on {named[:80]!r}, which is not built in"
            raise UsageError(f"{file} {said}: name --dataset, or the folder of your images with --data-dir")
    bad = BadImages(max_bad_images, Path("bad_images.txt"))
    config = resolve_preprocessing({"in_chans": in_chans, **asked.asked}, preprocessing)
    data = load_data(named, data_dir, config=config, bad=bad, class_map=asked.class_map)
    check_fixed(data, asked)
    return data


def _check_head(model: Any, data: Dataset) -> None:
    classes = getattr(model, "num_classes", None)
    if classes != data.num_classes:
        raise MissingError(f"the file's model tells {classes} classes apart, {data.name} has {data.num_classes}")


def _against(path: Path, file: Path, max_memory: int | None) -> tuple[str, nn.Module]:
    """Returns the model of a packed file with the weights of another file, packed or not, or of a folder of timm's.

    Before it stands what the weights are called.
    """
    from compressor import load
    from compressor.formats.errors import FileError
    from compressor.models.checkpoint import load_checkpoint, read_checkpoint
    from compressor.models.local_dir import WEIGHTS

    if path.is_dir():
        path = path / WEIGHTS
    model = load(file, max_memory=max_memory)
    cfg: Any = model.pretrained_cfg
    try:
        checkpoint = read_checkpoint(path, pickles=True)
        load_checkpoint(checkpoint, model, cfg["architecture"], "expected {expected}")
    except (FileError, MissingError) as exc:
        raise type(exc)(f"--against {exc}") from exc
    return "dense" if checkpoint.model is None else path.stem, model
