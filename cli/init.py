"""``compress init MODEL``: a recipe to begin with."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from compressor.cli.completion import completing, models
from compressor.cli.configs import ModelConfig
from compressor.formats.io.atomic import check_writable, write_atomically

__all__ = ["init"]


@click.command()
@click.argument("model", shell_complete=completing(models))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write. [default: MODEL.toml]")
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
def init(model: str, output: Path | None, force: bool) -> None:
    """Write a commented recipe for a MODEL, whose sensitive layers are treated apart."""
    target = Path(f"{ModelConfig(model).label}.toml") if output is None else output
    check_writable(target, force)
    from compressor.formats.loader import build_model
    from compressor.models.names import find_model
    from compressor.policy.suggestion import suggest_recipe

    named = find_model(model)
    text = suggest_recipe(build_model(named.architecture, named.args), model, named.cfg)
    write_atomically(target, text.encode(), force=force)
    click.echo(f"{target}  run it with: {shlex.join(['compress', model, '--recipe', str(target)])}")
