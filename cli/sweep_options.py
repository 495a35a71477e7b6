"""The options of ``compress sweep``: those of ``compress MODEL``, some of which take several values.

Nothing here imports torch or timm, so that ``--help`` is quick.
"""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from compressor.cli.compress import OPTIONS
from compressor.cli.configs import DisplayConfig, Request
from compressor.config_fields import config_field, config_fields
from compressor.formats.errors import CompressorError, UsageError, did_you_mean
from compressor.sweep.grid import Row, rows_of

__all__ = ["SWEEP_OPTIONS", "Plan", "SweepConfig", "given", "read_plan", "words"]

AXES = (
    "scheme", "bits", "codewords", "delta", "sparsity", "recipe", "target_size", "target_bits", "max_drop", "rate",
    "calibration", "epochs", "lr", "distill", "teacher", "seed",
)  # fmt: skip
"""Options that may have several values, between which there are commas."""
PER_ROW = ("output", "force", "resume", "summary", *(one.name for one in config_fields(DisplayConfig)))
"""Options of the output of one run, which a sweep says itself."""


@dataclass(frozen=True)
class SweepConfig:
    """What only a sweep is asked for."""

    folder: Path | None = config_field(
        None,
        "Folder of the sweep; the same command goes on with what is in it. [default: MODEL-sweep]",
        flags=("-o", "--output"),
    )
    jobs: int = config_field(1, "Rows at once.", ge=1, metavar="N")
    processes_per_row: int = config_field(
        1, "Processes that train each row together, as torchrun starts them; all on this machine.", ge=1, metavar="N"
    )
    finalists: int | None = config_field(
        None,
        "Train only so many configurations: those whose untrained files answer most like dense at their size.",
        ge=1,
        metavar="N",
    )
    storage: str | None = config_field(
        None,
        "Optuna's journal or database, by which several workers share the rows of one folder.",
        metavar="FILE|URL",
    )
    heartbeat: float = config_field(
        10.0,
        "Seconds between signs of life in --storage; after six without one, others take a worker's rows.",
        ge=0.1,
        metavar="SECONDS",
    )
    dry_run: bool = config_field(False, "List the rows and their commands; write nothing.")
    as_json: bool = config_field(False, "Print one JSON document instead of the table.", flags=("--json",))


class Several(click.ParamType[Any]):
    """Values of another type, between which there are commas."""

    name = "list"

    def __init__(self, one: click.ParamType[Any]) -> None:
        self.one = one

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        """Returns the values of a text, or of one or several values of TOML."""
        if isinstance(value, tuple):
            return value
        parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
        return tuple(self.one.convert(as_typed(part), param, ctx) for part in parts)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """Returns how the values are shown in the help."""
        del param, ctx
        return "A,B,..."


def as_typed(value: Any) -> Any:
    """Returns a number of TOML as it is typed on a command line."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _axis(option: click.Option) -> click.Option:
    several = copy.copy(option)
    several.type, several.default, several.metavar = Several(option.type), None, None
    return several


SINGLE = {str(option.name): option for option in OPTIONS if option.name not in PER_ROW}
SEVERAL = {name: _axis(SINGLE[name]) for name in AXES}
SWEEP_OPTIONS = list({**SEVERAL, **{name: one for name, one in SINGLE.items() if name not in SEVERAL}}.values())


@dataclass(frozen=True)
class Plan:
    """A sweep as it was asked for.

    Args:
        model: to compress.
        fixed: options that all rows share, by name.
        rows: all of them.
        processes: that train each row.
    """

    model: str
    fixed: Mapping[str, Any]
    rows: Sequence[Row]
    processes: int = 1

    def request(self, row: Row, **more: Any) -> Request:
        """Returns what a row asks for, which is checked.

        Raises:
            UsageError: options contradict each other; it names the row.
        """
        request = Request.from_command_line(self.model, {**self.fixed, **row.options, **more})
        try:
            request.check()
        except CompressorError as exc:
            raise type(exc)(f"row {row.name}: {exc}") from exc
        return request


def given(ctx: click.Context, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of a command's values that were given."""
    default = click.core.ParameterSource.DEFAULT
    return {name: value for name, value in values.items() if ctx.get_parameter_source(name) is not default}


def read_plan(model: str, values: Mapping[str, Any]) -> Plan:
    """Returns the sweep that a command asks for, or the one of a TOML file.

    Args:
        model: its name, or a file that ends in .toml.
        values: of the options that were given; with a file they win over its ``[options]``.

    Raises:
        UsageError: the file cannot be read, or has keys or values that cannot be.
    """
    axes = {name: values[name] for name in AXES if name in values}
    fixed = {name: value for name, value in values.items() if name not in AXES}
    if not model.endswith(".toml"):
        return Plan(model, fixed, rows_of([axes]))
    document = _document(Path(model))
    named, shared = document["model"], document.get("options", {})
    options = {key: _value(model, SINGLE, key, value) for key, value in _by_name(shared).items()}
    grids = [
        {key: _value(model, SEVERAL, key, value) for key, value in _by_name(grid).items()}
        for grid in document.get("grid", [{}])
    ]
    free = {name: value for name, value in options.items() if name not in axes}
    return Plan(named, {**free, **fixed}, rows_of([{**grid, **axes} for grid in grids]))


def _document(path: Path) -> dict[str, Any]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"{path}: cannot be read ({getattr(exc, 'strerror', None) or exc})") from exc
    except tomllib.TOMLDecodeError as exc:
        raise UsageError(f"{path} is not TOML: {exc}") from None
    _only_known(str(path), document, ("model", "options", "grid"))
    if not isinstance(document.get("model"), str):
        raise UsageError(f'{path}: expected model = "NAME", got {document.get("model")!r}')
    grids = document.get("grid", [])
    if not isinstance(grids, list) or not all(isinstance(one, dict) for one in [document.get("options", {}), *grids]):
        raise UsageError(f"{path}: expected one table [options] and tables [[grid]]")
    return document


def _by_name(table: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a table with the names of options as keys: ``data-dir`` is data_dir, ``set`` settings."""
    flags = {flag.removeprefix("--"): name for name, one in SINGLE.items() for flag in one.opts}
    return {flags.get(key.replace("_", "-"), key): value for key, value in table.items()}


def _only_known(where: str, table: Iterable[str], known: Sequence[str]) -> None:
    for key in table:
        if key not in known:
            raise UsageError(f"{where}: unknown key {key!r}.{did_you_mean(key, known)} Known keys: {', '.join(known)}")


def _value(where: str, options: Mapping[str, click.Option], key: str, value: Any) -> Any:
    """Returns a value of a TOML file as the option has it."""
    _only_known(where, [key], list(options))
    option = options[key]
    try:
        return option.type_cast_value(click.Context(click.Command("sweep")), as_typed(value))
    except (click.BadParameter, TypeError, AttributeError) as exc:
        reason = exc.message if isinstance(exc, click.BadParameter) else f"{value!r} is no value of it"
        raise UsageError(f"{where}: {key}: {reason}") from None


def words(values: Mapping[str, Any]) -> list[str]:
    """Returns the words of a command line that give these values to the options of ``compress MODEL``.

    Example:
        >>> words({"scheme": "learnt", "rate": 1e-07, "amp": True, "fold_norms": False, "settings": ("a=1", "b=2")})
        ['--scheme', 'learnt', '--rate', '1e-07', '--amp', '--no-fold-norms', '--set', 'a=1', '--set', 'b=2']
    """
    return [word for name, value in values.items() for word in _words(SINGLE[name], value)]


def _words(option: click.Option, value: Any) -> list[str]:
    flag = next(one for one in option.opts if one.startswith("--"))
    if value is None:
        return []
    if option.is_flag and isinstance(value, bool):
        return [flag] if value else option.secondary_opts[:1]
    if option.multiple:
        return [word for one in value for word in (flag, str(one))]
    if option.nargs > 1:
        return [flag, *map(str, value)]
    return [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
