"""``compress pack`` and ``compress unpack``: from a plain checkpoint to a packed file, and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compressor.cli.compress import OPTIONS
from compressor.cli.configs import Request
from compressor.cli.files import PackedPath, in_bytes, memory_option, open_packed
from compressor.formats.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["pack", "unpack"]

ENDING = ".safetensors"
WITHOUT_DATA = {
    "scheme", "bits", "codewords", "delta", "sparsity", "settings", "recipe", "target_size", "target_bits", "rate",
    "calibration", "num_classes", "in_chans", "img_size", "codec", "untouched", "fold_norms", "output", "force",
    "everything", "as_json",
}  # fmt: skip


def _pack(model: str, **values: Any) -> None:
    request = Request.from_command_line(model, values)
    request.check()
    from compressor.cli.run import run

    run(request)


# The very options of `compress MODEL`, so that both commands always mean and do the same.
pack = click.Command(
    "pack",
    params=[
        click.Argument(["model"]),
        click.Option(["--checkpoint-path"], type=click.Path(path_type=Path), required=True, help="Its weights."),
        *(option for option in OPTIONS if option.name in WITHOUT_DATA),
    ],
    callback=_pack,
    help="Pack a checkpoint, without training.\n\nThe same as compress MODEL --checkpoint-path FILE without data.",
)


@click.command()
@click.argument("file", type=PackedPath(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The .safetensors file to write.")
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
@memory_option
def unpack(file: Path, output: Path, force: bool, max_memory: int | None) -> None:
    """Write a packed FILE as a plain checkpoint.

    Names, shapes and values are those of the model's state dict: timm loads it by checkpoint_path.
    """
    from compressor.formats.io.atomic import check_writable, write_atomically
    from compressor.formats.io.locking import holding

    if output.suffix != ENDING:
        raise UsageError(f"-o {output}: timm knows a plain checkpoint by its ending, name it {output.stem}{ENDING}")
    check_writable(output, force)
    click.get_current_context().with_resource(holding(output))
    with open_packed(file, max_memory) as packed:
        model = packed.model
    from safetensors.torch import save

    from compressor.formats.loader import load_state_dict

    # A tied tensor is written under each of its names: timm asks for all of them, and ties them itself.
    state = load_state_dict(file, max_memory=in_bytes(max_memory))
    tensors = {name: tensor.clone().contiguous() for name, tensor in state.items()}
    data = save(tensors, {"format": "pt"})
    write_atomically(output, data, verify=lambda written: _verify(written, tensors), force=force)
    click.echo(f"{output}  {len(data):,} bytes, reopened and verified")
    click.echo(_how_to_load(model, output))


def _verify(written: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises IntegrityError unless the checkpoint reads back bit for bit."""
    import torch
    from safetensors.torch import load_file

    from compressor.formats.errors import IntegrityError

    def same(one: Tensor, two: Tensor) -> bool:  # compared as bytes, so that a NaN equals itself
        alike = one.shape == two.shape and one.dtype == two.dtype
        return alike and torch.equal(one.reshape(-1).view(torch.uint8), two.reshape(-1).view(torch.uint8))

    read = load_file(written)
    if read.keys() != tensors.keys() or not all(same(read[name], tensors[name]) for name in tensors):
        raise IntegrityError("the checkpoint reads back differently from what was written: please report this")


def _how_to_load(model: Mapping[str, Any] | None, output: Path) -> str:
    if model is None:
        return f"load it with: model.load_state_dict(safetensors.torch.load_file({str(output)!r}))"
    named = {**model["args"], "checkpoint_path": str(output)}
    arguments = ", ".join(f"{key}={value!r}" for key, value in named.items())
    return f"load it with: timm.create_model({model['name']!r}, {arguments})"
