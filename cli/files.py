"""``compress inspect`` and ``compress eval``: commands on a packed file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from compressor.cli.completion import checkpoints, completing
from compressor.cli.show import accuracy_line, percent, print_json, width
from compressor.formats.errors import FormatError, MissingError, UsageError

if TYPE_CHECKING:
    from compressor.data.datasets import Dataset
    from compressor.formats.file.reader import PackedFile
    from compressor.report.provenance import Provenance

__all__ = ["EVAL_BATCH", "PackedPath", "evaluate", "in_bytes", "inspect", "memory_option", "open_packed"]

EVAL_BATCH = 256
GIB = 1 << 30


class PackedPath(click.Path):
    """A packed file: a path, or zoo:NAME for a checkpoint that comes with the package; ./zoo:NAME is a file."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Returns the path."""
        from compressor.model_zoo import packed_path

        return packed_path(value) if isinstance(value, str) else super().convert(value, param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Completes names of checkpoints, and paths."""
        return completing(checkpoints, files=True)(ctx, param, incomplete)


packed_file = click.argument("file", type=PackedPath(path_type=Path))
memory_option = click.option(
    "--max-memory", metavar="GIB", type=click.IntRange(1), help="Allow tensors of so many GiB, from a FILE you trust."
)


def in_bytes(max_memory: int | None) -> int | None:
    """Returns the bytes of as many GiB; None, for what is believable, as it is."""
    return None if max_memory is None else max_memory * GIB


@contextmanager
def open_packed(path: Path, max_memory: int | None) -> Iterator[PackedFile]:
    """Opens a packed file of unknown origin.

    Args:
        path: of the file.
        max_memory: GiB that its tensors may decode to; None: as many as are believable for its size.

    Raises:
        FormatError: the file would decode to more.
    """
    from compressor.formats.file.memory import believable_memory
    from compressor.formats.file.reader import PackedFile

    with PackedFile.open(path, max_memory=sys.maxsize) as packed:  # opening it decodes nothing
        size, decoded = packed.source.size, packed.decoded_size
        allowed = in_bytes(max_memory) or believable_memory(size)
        if decoded > allowed:
            raise FormatError(
                f"{path}: {size:,} bytes that decode to {decoded:,}, more than the {allowed:,} allowed; "
                f"if you trust the file: --max-memory {-(-decoded // GIB)}"
            )
        yield packed


@click.command()
@packed_file
@click.option("--all", "everything", is_flag=True, help="Show every tensor, not the largest only.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead.")
@click.option("--markdown", is_flag=True, help="Print the table as Markdown instead.")
@memory_option
def inspect(file: Path, everything: bool, as_json: bool, markdown: bool, max_memory: int | None) -> None:
    """Show what a packed FILE holds, tensor by tensor; the model is not built."""
    from compressor.report.report import Report

    if as_json and markdown:
        raise UsageError("--json and --markdown: name one")
    with open_packed(file, max_memory) as packed:
        report = Report.of(packed)
        model = packed.model
    if as_json:
        print_json({"file": str(file), "model": model, **report.to_dict()})
    elif markdown:
        click.echo(report.to_markdown())
    else:
        click.echo(report.table(width(), everything))
        made = report.provenance
        if made.top1 is not None and made.data is not None:
            before = f"dense {percent(made.top1.dense)} -> " if made.top1.dense is not None else ""
            after = f"packed file {percent(made.top1.packed)}, as recorded when it was written"
            click.echo(f"top-1 on {made.data.n:,} {made.data.split} images of {made.data.name}  {before}{after}")


@click.command("eval")
@packed_file
@click.option("--dataset", help="Data set; by default the built-in one that the file was made with.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Folder of its files.")
@click.option("--batch-size", type=click.IntRange(1), default=EVAL_BATCH, show_default=True)
@click.option("--device", help="cpu, cuda, cuda:1, mps ...  [default: a GPU if there is one]")
@click.option("--max-bad-images", metavar="N", type=click.IntRange(0), default=0, show_default=True,
              help="Images that may be unreadable; all are listed in bad_images.txt.")  # fmt: skip
@memory_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead.")
def evaluate(
    file: Path,
    dataset: str | None,
    data_dir: Path | None,
    batch_size: int,
    device: str | None,
    max_bad_images: int,
    max_memory: int | None,
    as_json: bool,
) -> None:
    """Measure top-1 of a packed FILE."""
    from compressor import load
    from compressor.distributed.devices import find_device
    from compressor.report.provenance import read_provenance
    from compressor.training.evaluation import evaluate as measure

    where = find_device(device)
    with open_packed(file, max_memory) as packed:
        made, preprocessing = read_provenance(packed), dict(packed.preprocessing or {})
    data = _data(file, dataset, data_dir, made, preprocessing, max_bad_images)
    model = load(file, max_memory=in_bytes(max_memory)).to(where)
    _check_head(model, data)
    result = measure(model, data.eval_loader(batch_size))
    recorded = _recorded(made, data)
    if as_json:
        low, high = result.interval
        facts = {"name": data.name, "version": data.version, "split": data.evaluated, "n": result.n}
        accuracy = {"packed": result.top1, "low": low, "high": high, "recorded": recorded}
        print_json({"file": str(file), "data": facts, "top1": accuracy})
        return
    note = {None: "", result.top1: "  as recorded in the file"}.get(recorded, f"  recorded in the file: {recorded!r}")
    click.echo(accuracy_line(result, None, data.evaluated, made.seed) + note)


def _data(
    file: Path,
    dataset: str | None,
    data_dir: Path | None,
    made: Provenance,
    preprocessing: dict[str, Any],
    max_bad_images: int,
) -> Dataset:
    from compressor.data.bad_images import BadImages
    from compressor.data.datasets import BUILT_IN, load_data

    named = dataset if dataset is not None else ("" if data_dir is not None else None)
    if named is None:
        named = made.data.name if made.data is not None else None
        if named not in BUILT_IN:  # any other name could make timm fetch or run what the author of the file wants
            said = "names no data set" if named is None else f"was measured on {named[:80]!r}, which is not built in"
            raise UsageError(f"{file} {said}: name --dataset, or the folder of your images with --data-dir")
    return load_data(named, data_dir, config=preprocessing, bad=BadImages(max_bad_images, Path("bad_images.txt")))


def _check_head(model: Any, data: Dataset) -> None:
    classes = getattr(model, "num_classes", None)
    if classes != data.num_classes:
        raise MissingError(f"the file's model tells {classes} classes apart, {data.name} has {data.num_classes}")


def _recorded(made: Provenance, data: Dataset) -> float | None:
    if made.data is None or made.top1 is None:
        return None
    same = made.data.version == data.version and made.data.split == data.evaluated
    return made.top1.packed if same else None
