"""``compress verify`` and ``compress diff``: whether a packed file is sound, and how two differ. Needs no torch."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from compressor.cli.files import PackedPath, memory_option, open_packed
from compressor.cli.show import echo, print_json, print_table
from compressor.formats.errors import IntegrityError, UsageError
from compressor.formats.io.hub import pinned_name

if TYPE_CHECKING:
    from compressor.cli.difference import Difference, Row
    from compressor.formats.file.reader import PackedFile

__all__ = ["diff", "verify"]

CHUNK = 1 << 20
packed_file = PackedPath(path_type=Path)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead.")


@click.command()
@click.argument("file", type=packed_file)
@click.option("--sha256", "wanted", metavar="HEX", help="The SHA-256 the whole file should have.")
@memory_option
@json_option
def verify(file: Path, wanted: str | None, max_memory: int | None, as_json: bool) -> None:
    """Check every part of a packed FILE.

    Each bad part is listed on a line of its own, and the exit code is 3 where there are any. The checksums in a file
    find accidents; only a SHA-256 you trust finds a file that was replaced.
    """
    if wanted is not None and not re.fullmatch("[0-9a-fA-F]{64}", wanted):
        raise UsageError(f"--sha256 {wanted}: expected 64 hexadecimal digits")
    with open_packed(file, max_memory) as packed:
        bad = [str(error) for error in packed.check()]
        checked = {"tensors": len(packed.sites) + len(packed.untouched), "codebooks": len(packed.book_entries)}
        sums = {"sha256": _sha256(packed), "content_sha256": packed.content_sha256()}
        size, name = packed.source.size, packed.label
    replaced = wanted is not None and wanted.lower() != sums["sha256"]
    if as_json:
        good = not bad and not replaced
        print_json(
            {
                "file": str(file),
                "hub": pinned_name(file),
                "good": good,
                "bytes": size,
                "checked": checked,
                **sums,
                "bad": bad,
            }
        )
    elif bad:
        click.echo("\n".join(dict.fromkeys(bad)))  # parts with a checksum in common have the same line
    if replaced:
        raise IntegrityError(f"{name}: its sha256 is {sums['sha256']}, expected {str(wanted).lower()}")
    if bad:
        raise IntegrityError(f"{name}: {len(bad)} of {sum(checked.values())} parts are bad: fetch it again")
    if not as_json:
        parts = " and ".join(f"{count} {kind}" for kind, count in checked.items())
        echo(f"{name}: good, {size:,} bytes, {parts} checked")
        print_table([[name.replace("_", " "), digest] for name, digest in sums.items()])


def _sha256(packed: PackedFile) -> str:
    """Returns the SHA-256 of the file, read through the descriptor that its parts were read from."""
    digest, size = hashlib.sha256(), packed.source.size
    for start in range(0, size, CHUNK):
        digest.update(packed.source.read(start, min(CHUNK, size - start)))
    return digest.hexdigest()


@click.command()
@click.argument("a", type=packed_file)
@click.argument("b", type=packed_file)
@memory_option
@json_option
def diff(a: Path, b: Path, max_memory: int | None, as_json: bool) -> None:
    """Show how packed file B differs from A.

    Tensors are decoded and compared one by one, then the metadata and the sizes; SQNR is that of B against A.
    Provenance, such as the accuracy noted in a file, is not compared. The exit code is 0 whether or not the files
    differ.
    """
    from compressor.cli.difference import Difference

    with open_packed(a, max_memory) as first, open_packed(b, max_memory) as second:
        difference = Difference.of(first, second)
    if as_json:
        print_json({"a": str(a), "b": str(b), **difference.to_json()})
    elif difference.identical:
        click.echo(f"identical content, sha256 {difference.content[0]}")
    else:
        _show(difference)


def _show(difference: Difference) -> None:
    """Prints a line for each tensor and each entry of the metadata that differs, and the totals."""
    if difference.rows:
        heads = ["tensor", "weights", "differ", "max |d|", "SQNR", "bytes", "what"]
        alike = len(difference.rows) > 1 and len({row.what for row in difference.rows}) == 1
        kept = len(heads) - alike  # what is the same in all rows stands once, below
        print_table(
            [row[:kept] for row in (heads, *map(_cells, difference.rows))],
            spare=("weights", "max |d|"),
        )
        if alike:
            echo(f"each differs in {', '.join(difference.rows[0].what)}")
    for path, (old, new) in difference.metadata.items():
        echo(f"{path}  {'nothing' if old is None else old} -> {'nothing' if new is None else new}")
    weights, differ = difference.weights
    echo(f"{len(difference.rows)} of {difference.tensors} tensors and {differ:,} of {weights:,} weights differ")
    sizes = (f"{kind} {old:,} -> {new:,}" for kind, (old, new) in difference.sizes.items())
    echo("bytes  " + ", ".join(sizes))


def _cells(row: Row) -> list[str]:
    return [
        row.tensor,
        f"{row.weights:,}",
        "" if row.differ is None else f"{row.differ:,}",
        "" if row.max_abs is None else f"{row.max_abs:.3g}",
        "exact" if row.differ == 0 else "" if row.sqnr is None else f"{row.sqnr:.1f} dB",
        " -> ".join("none" if size is None else f"{size:,}" for size in row.bytes),
        ", ".join(row.what),
    ]
