"""``compress inspect``, and packed files as arguments of commands."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from compressor.cli.completion import checkpoints, completing
from compressor.cli.show import print_json, say, styled, width
from compressor.cli.values import WholeNumber
from compressor.formats.errors import FormatError, UsageError

if TYPE_CHECKING:
    from compressor.formats.file.reader import PackedFile

__all__ = [
    "EVAL_BATCH",
    "PackedPath",
    "in_bytes",
    "inspect",
    "memory_option",
    "open_packed",
    "packed_file",
]

EVAL_BATCH = 256
GIB = 1 << 30


class PackedPath(click.Path):
    """A packed file: a path, zoo:NAME for a checkpoint that comes with the package, or hf-hub:OWNER/NAME for the hub.

    ./zoo:NAME and ./hf-hub:NAME are files.
    """

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Returns the path; says which commit it is of where it comes from the hub."""
        if not isinstance(value, str) or (ctx is not None and ctx.resilient_parsing):  # a shell that completes words
            return super().convert(value, param, ctx)
        from compressor.formats.io.hub import PREFIX, pinned_name
        from compressor.model_zoo import packed_path

        path = packed_path(value)
        if value.startswith(PREFIX):
            say(f"{pinned_name(path)}  {path.stat().st_size:,} bytes")
        return path

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Completes names of checkpoints, and paths."""
        return completing(checkpoints, files=True)(ctx, param, incomplete)


packed_file = click.argument("file", type=PackedPath(path_type=Path))
memory_option = click.option(
    "--max-memory", metavar="GIB", type=WholeNumber(1), help="Allow tensors of so many GiB, from a FILE you trust."
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
                f"{packed.label}: {size:,} bytes that decode to {decoded:,}, more than the {allowed:,} allowed; "
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
    """Show what a packed FILE is, and what it holds, tensor by tensor; the model is not built."""
    from compressor.report.report import Report

    if as_json and markdown:
        raise UsageError("--json and --markdown: name one")
    with open_packed(file, max_memory) as packed:
        report = Report.of(packed)
    if as_json:
        print_json({"file": str(file), **report.to_dict()})
    elif markdown:
        click.echo(report.to_markdown())
    else:
        head, _, rows = report.table(width(), everything, "--all").partition("\n")
        click.echo("\n".join([report.heading(width()), "", styled(head, bold=True), rows]))
