"""``compress schemes``, ``compress env`` and ``compress zoo list``: what this installation has."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict
from itertools import takewhile
from textwrap import fill
from typing import TYPE_CHECKING, Any, TypeVar

import click

from compressor.cli.show import WHOLE_WORDS, print_json, print_table, say, styled, width
from compressor.report.interval import interval_text

if TYPE_CHECKING:
    from compressor.formats.registry import Registry
    from compressor.model_zoo import Checkpoint

__all__ = ["described", "env", "schemes", "zoo"]

P = TypeVar("P")

PACKAGES = (
    "torch", "torchvision", "timm", "safetensors", "bitarray", "click", "tabulate", "numpy", "pydantic", "scikit-learn",
)  # fmt: skip
INDENT = "    "
WIDE = 136  # columns that the whole table of checkpoints takes
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead.")


def described(registry: Registry[P], describe: Callable[[type[P]], dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns what ``describe`` says of each plug-in, in the order of ids; broken packages are named on stderr."""
    from compressor.formats.errors import UsageError

    listed, names = [], registry.built_in()
    try:
        names = frozenset(registry)
    except UsageError as error:  # packages that offer one id twice must not hide the plug-ins of this one
        say(f"warning: {error}")
    for name in sorted(names):
        try:
            listed.append(describe(registry[name]))
        except UsageError as error:  # one broken package must not hide the plug-ins of all others
            say(f"warning: {error}")
    return listed


@click.command()
@as_json
def schemes(as_json: bool) -> None:
    """List the schemes: settings with their defaults, and the paper."""
    from compressor import SCHEMES
    from compressor.sharing.registry import describe

    listed = described(SCHEMES, describe)
    if as_json:
        print_json({"schemes": listed})
        return
    for scheme in listed:
        settings = ", ".join(f"{key}={value}" for key, value in scheme["settings"].items())
        usage = f"settings  {settings}  (--set KEY=VALUE)" if settings else "settings  none"
        head = f"{scheme['id']}: {scheme['summary']}"
        text = fill(head, width(), subsequent_indent=INDENT, **WHOLE_WORDS)
        click.echo(styled(scheme["id"], bold=True) + text.removeprefix(scheme["id"]))
        for line in (usage, f"paper     {scheme['paper']}"):
            click.echo(fill(line, width(), initial_indent=INDENT, subsequent_indent=3 * INDENT, **WHOLE_WORDS))


@click.command()
@as_json
def env(as_json: bool) -> None:
    """Show versions and machine: paste it into a report."""
    from importlib.metadata import version

    import torch

    import compressor
    from compressor.cache import cache_dir

    facts: dict[str, Any] = {
        "timm-compressor": compressor.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: version(name) for name in PACKAGES},
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "cache": str(cache_dir()),
        "executable": sys.executable,
    }
    if as_json:
        print_json(facts)
    else:
        print_table(
            [[key, ", ".join(value) or "none" if isinstance(value, list) else value] for key, value in facts.items()]
        )


@click.group()
def zoo() -> None:
    """The recipes and packed checkpoints that come with the package."""


@zoo.command("list")
@as_json
def zoo_list(as_json: bool) -> None:
    """List the recipes, for compress MODEL --recipe NAME, and the checkpoints, for zoo:NAME in place of a FILE."""
    from compressor.model_zoo import checkpoint, list_checkpoints, list_recipes, recipe_text

    recipes = {name: _summary(recipe_text(name)) for name in list_recipes()}
    checkpoints = [checkpoint(name) for name in list_checkpoints()]
    if as_json:
        figures = [{**asdict(entry), "bits_per_weight": entry.bits_per_weight} for entry in checkpoints]
        summaries = [{"name": name, "summary": text} for name, text in recipes.items()]
        print_json({"recipes": summaries, "checkpoints": figures})
        return
    columns = width()
    indent = max(map(len, recipes)) + 2
    for name, text in recipes.items():
        click.echo(fill(f"{name:{indent}}{text}", columns, subsequent_indent=" " * indent))
    click.echo()
    heads = ["checkpoint", "bytes", "bits/weight", "dense", "top-1", "95 %", "measured on"]
    kept = len(heads) if columns >= WIDE else 5
    print_table([row[:kept] for row in (heads, *map(_cells, checkpoints))])


def _summary(recipe: str) -> str:
    r"""Returns the first sentence of the comment that a recipe begins with.

    >>> _summary("# Four values. Not run\n# here.\n[[stage]]\n# more")
    'Four values.'
    """
    lines = takewhile(lambda line: line.startswith("#"), recipe.splitlines())
    text = " ".join(line.lstrip("# ") for line in lines)
    return text[: text.index(". ") + 1] if ". " in text else text


def _cells(entry: Checkpoint) -> list[str]:
    return [
        f"zoo:{entry.name}",
        f"{entry.bytes:,}",
        f"{entry.bits_per_weight:.2f}",
        f"{100 * entry.dense_top1:.2f} %",
        f"{100 * entry.top1:.2f} %",
        interval_text(*entry.interval, 2),
        f"{entry.n:,} test images of {entry.dataset}",
    ]
