"""``compress pack`` and ``compress unpack``: from a plain checkpoint to a packed file, and back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compressor.cli.compress import MODEL, OPTIONS, SectionedCommand
from compressor.cli.configs import Request
from compressor.cli.files import PackedPath, in_bytes, memory_option, open_packed
from compressor.cli.preprocessing import PreprocessingConfig
from compressor.config_fields import config_fields
from compressor.formats.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["pack", "unpack"]

ENDING = ".safetensors"
WITHOUT_DATA = {
    "scheme", "bits", "codewords", "delta", "sparsity", "settings", "recipe", "target_size", "target_bits", "rate",
    "calibration", "calibration_memory", "num_classes", "in_chans", "codec", "untouched", "fold_norms", "output",
    "force", "everything", "as_json", *(one.name for one in config_fields(PreprocessingConfig)),
}  # fmt: skip


def _pack(model: str, **values: Any) -> None:
    request = Request.from_command_line(model, values)
    request.check()
    from compressor.cli.run import run

    run(request)


# The very options of `compress MODEL`, so that both commands always mean and do the same.
pack = SectionedCommand(
    "pack",
    params=[
        MODEL,
        click.Option(["--checkpoint-path"], type=PackedPath(path_type=Path), required=True, help="Its weights."),
        *(option for option in OPTIONS if option.name in WITHOUT_DATA),
    ],
    callback=_pack,
    help="Pack a checkpoint, without training.\n\nThe same as compress MODEL --checkpoint-path FILE without data.",
)


@click.command()
@click.argument("file", type=PackedPath(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True,
              help="The folder to write, for timm's local-dir:, or one .safetensors file.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace what exists.")
@memory_option
def unpack(file: Path, output: Path, force: bool, max_memory: int | None) -> None:
    """Write a packed FILE as a plain checkpoint.

    Names, shapes and values are those of the model's state dict. A folder has a config.json too, by which timm builds
    the model, prepares its images and names its classes.
    """
    from compressor.formats.io.atomic import check_not_input, check_writable

    is_folder = output.suffix != ENDING and (not output.suffix or os.path.isdir(output))
    if not is_folder and output.suffix != ENDING:
        raise UsageError(f"-o {output}: name a folder, or a file that ends in {ENDING}, such as {output.stem}{ENDING}")
    if is_folder:
        from compressor.models.local_dir import WEIGHTS  # imports timm, which errors of usage do without

        check_not_input(output / WEIGHTS, file)
    else:
        check_not_input(output, file)
        check_writable(output, force)
    with open_packed(file, max_memory) as packed:
        model, preprocessing = packed.model, dict(packed.preprocessing or {})
    if not is_folder:
        _write_weights(lambda: _tensors(file, max_memory), output, force)
        click.echo(_how_to_load(model, preprocessing, output))
        return
    if model is None:
        raise UsageError(f"-o {output}: {file} names no timm model to write a folder of, name a file {output}{ENDING}")
    _write_folder(file, output, max_memory, force, (model, preprocessing))
    click.echo(f"load it with: timm.create_model({f'local-dir:{output}'!r}, pretrained=True)")


def _write_folder(
    file: Path, folder: Path, max_memory: int | None, force: bool, about: tuple[Mapping[str, Any], Mapping[str, Any]]
) -> None:
    """Writes weights and configuration into a folder; without the latter timm loads nothing, so it is written last."""
    from compressor.formats.io.atomic import check_writable, make_folder, write_atomically
    from compressor.models.local_dir import CONFIG, WEIGHTS, local_config

    config = json.dumps(local_config(*about), indent=2)
    for name in (CONFIG, WEIGHTS) if folder.is_dir() else ():
        check_writable(folder / name, force)
    tensors = _tensors(file, max_memory)  # before there is a folder, which a damaged file would leave empty
    make_folder(folder)
    _write_weights(lambda: tensors, folder / WEIGHTS, force)
    write_atomically(folder / CONFIG, config.encode(), force=force)


def _tensors(file: Path, max_memory: int | None) -> dict[str, Tensor]:
    """Returns the tensors of a packed file; a tied one under each of its names, for timm asks for all of them."""
    from compressor.formats.loader import load_state_dict

    state = load_state_dict(file, max_memory=in_bytes(max_memory))
    return {name: tensor.clone().contiguous() for name, tensor in state.items()}


def _write_weights(read: Callable[[], dict[str, Tensor]], output: Path, force: bool) -> None:
    """Writes tensors as an ordinary safetensors file; they are read when no other command writes it."""
    from compressor.formats.io.atomic import check_writable, write_atomically
    from compressor.formats.io.locking import holding

    check_writable(output, force)
    click.get_current_context().with_resource(holding(output))
    from safetensors.torch import save

    tensors = read()
    data = save(tensors, {"format": "pt"})
    write_atomically(output, data, verify=lambda written: _verify(written, tensors), force=force)
    click.echo(f"{output}  {len(data):,} bytes, reopened and verified")


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


def _how_to_load(model: Mapping[str, Any] | None, preprocessing: Mapping[str, Any], output: Path) -> str:
    """Returns the line by which timm gives the model, and knows how its images are prepared."""
    if model is None:
        return f"load it with: model.load_state_dict(safetensors.torch.load_file({str(output)!r}))"
    named = {**model["args"], "checkpoint_path": str(output)}
    if prepared := {key: value for key, value in preprocessing.items() if key != "label_names"}:
        named["pretrained_cfg_overlay"] = prepared
    arguments = ", ".join(f"{key}={value!r}" for key, value in named.items())
    return f"load it with: timm.create_model({model['name']!r}, {arguments})"
