"""``compress push``: a packed file on the Hugging Face hub, with its model card."""

from __future__ import annotations

from pathlib import Path

import click

from compressor.cli.files import in_bytes, memory_option, open_packed, packed_file
from compressor.cli.show import print_json, print_table

__all__ = ["push"]


@click.command()
@packed_file
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--folder", metavar="DIR", type=click.Path(path_type=Path, file_okay=False),
              help="Write the files into this folder, and push nothing.")  # fmt: skip
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--base-model", metavar="OWNER/NAME", help="Repository of the dense weights, for the model card.")
@click.option("--force", is_flag=True, help="Replace what exists; earlier commits keep it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead.")
@memory_option
def push(
    file: Path,
    repository: str,
    folder: Path | None,
    private: bool,
    base_model: str | None,
    force: bool,
    as_json: bool,
    max_memory: int | None,
) -> None:
    """Put a packed FILE on the Hugging Face hub, with a model card.

    The token is that of HF_TOKEN or of 'hf auth login'. Every command then takes hf-hub:OWNER/NAME for the FILE:
    docs/hub.md.
    """
    from compressor.publishing.push import push_to_hub

    with open_packed(file, max_memory):  # refuses a file that would take more memory than is believable
        pass
    done = push_to_hub(
        file, repository, folder=folder, private=private, base_model=base_model, force=force,
        max_memory=in_bytes(max_memory),
    )  # fmt: skip
    sizes = [{"name": name, "bytes": size} for name, size in done.files.items()]
    if as_json:
        print_json({"file": str(file), "name": done.name, "place": done.place, "files": sizes})
        return
    click.echo(f"{done.place}  {len(sizes)} files, {'written' if folder else 'pushed and compared'}")
    print_table([[name, f"{size:,} bytes"] for name, size in done.files.items()])
    click.echo(f"load it with: compressor.load({done.name!r})")
