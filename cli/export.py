"""``compress export`` and ``compress targets``: packed files for other runtimes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import click

from compressor.cli.about import described
from compressor.cli.completion import completing
from compressor.cli.files import in_bytes, memory_option, open_packed, packed_file
from compressor.cli.show import echo, percent, print_json, print_table, width
from compressor.cli.values import WholeNumber
from compressor.formats.errors import UsageError

if TYPE_CHECKING:
    from compressor.deployment.export import Exported

__all__ = ["export", "targets"]

INDENT = "    "
LEGEND = (
    "bytes of the weights: uncoded, coded with one scale a tensor, which keeps equal weights equal, and with one a "
    "channel, which does not; bits a weight as coded"
)


def _targets() -> Iterable[str]:
    from compressor.deployment.registry import TARGETS

    return TARGETS


@click.command()
@packed_file
@click.option("--to", "target", required=True, metavar="TARGET", shell_complete=completing(_targets),
              help="reader, onnx, torch ...: compress targets lists them.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path),
              help="The file to write.  [default: beside FILE; in this folder for zoo: and hf-hub:]")  # fmt: skip
@click.option("--dense", is_flag=True, help="Write floats, for a runtime that takes no packed integers.")
@click.option("--opset", type=WholeNumber(1), metavar="N", help="The highest that the runtime knows.")
@click.option("--half", is_flag=True, help="Compute with float16, as a Neural Engine does.")
@click.option("--estimate", is_flag=True, help="Print bytes by the runtime's own coder, and write nothing.")
@click.option("--force", is_flag=True, help="Replace what exists.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead.")
@memory_option
def export(
    file: Path,
    target: str,
    output: Path | None,
    dense: bool,
    opset: int | None,
    half: bool,
    estimate: bool,
    force: bool,
    as_json: bool,
    max_memory: int | None,
) -> None:
    """Write a packed FILE for another runtime, run what was written (or read it back), and compare it.

    How to run each: docs/deploy.md.
    """
    from compressor.deployment.export import export as write
    from compressor.deployment.registry import make_target
    from compressor.model_zoo.index import INDEX

    if estimate and output is not None:
        raise UsageError(f"-o {output}: --estimate writes no file, leave it out")
    given = {"dense": dense or None, "opset": opset, "half": half or None}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    name = make_target(target, settings).file_name(file.stem)  # a wrong name is said before a file is opened
    if output is None and file.parent == INDEX.parent / "checkpoints":
        output = Path(name)
    with open_packed(file, max_memory):  # refuses a file that would take more memory than is believable
        pass
    if estimate:
        _estimate(file, target, settings, as_json, max_memory)
        return
    done = write(file, target, output, force=force, max_memory=in_bytes(max_memory), **settings)
    if as_json:
        print_json({**asdict(done), "path": str(done.path)})
    else:
        _show(done)


def _show(done: Exported) -> None:
    from compressor.deployment.registry import TARGETS

    equal = f"logits within {done.difference:.1e} of the largest" if done.difference else "equal bit for bit"
    how = "run" if done.run else "read back"
    beside = "".join(f" and {ending}" for ending in TARGETS[done.target].companions)
    echo(f"{done.path}{beside}  {done.exported:,} bytes, {how} and compared: {equal}")
    rows = [("dense", done.dense), ("packed", done.packed), (done.target, done.exported)]
    print_table([[name, f"{size:,} bytes", f"{percent(size / done.dense)} of dense"] for name, size in rows])
    if done.exported >= done.dense:
        echo("note  larger than the dense file: of so small a network the program takes more than the weights")
    for note in done.notes:
        echo(f"note  {note}", len(INDENT))
    echo(f"limits  {done.limits}", len(INDENT))
    click.echo(f"run it  {done.usage}")  # in one line, to be copied


def _estimate(file: Path, target: str, settings: dict[str, Any], as_json: bool, max_memory: int | None) -> None:
    """Prints what the layers of a file take by the coder of a target."""
    from compressor.deployment.estimate import estimate

    found = estimate(file, target, in_bytes(max_memory), **settings)
    if as_json:
        print_json({"target": found.target, "layers": [asdict(each) for each in found.layers],
                    "total": asdict(found.total), "limits": found.limits})  # fmt: skip
        return
    head = ["layer", "shape", "uncoded", "coded", "bits", "by channel"]
    rows = [
        [each.site, "x".join(map(str, each.shape)), f"{each.uncoded:,}", f"{each.per_tensor:,}",
         f"{8 * each.per_tensor / max(each.uncoded, 1):.2f}", f"{each.per_channel:,}"]
        for each in (*found.layers, found.total)
    ]  # fmt: skip
    print_table([head, *rows])
    echo(LEGEND, len(INDENT))
    echo(f"limits  {found.limits}", len(INDENT))


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead.")
def targets(as_json: bool) -> None:
    """List the targets of compress export: what they write, what they need, and their limits."""
    from compressor.deployment.registry import TARGETS, describe

    listed = described(TARGETS, describe)
    if as_json:
        print_json({"targets": listed})
        return
    for target in listed:
        echo(f"{target['id']}: {target['summary']}", len(INDENT))
        needs = f"python -m pip install '{target['install']}'" if target["install"] else "nothing more"
        for head, text in (("needs", needs), ("limits", target["limits"])):
            click.echo(fill(f"{head:8}{text}", width(), initial_indent=INDENT, subsequent_indent=3 * INDENT))
