"""Click's options, made from the described fields of a config."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from compressor.cli.values import Number, WholeNumber, Word
from compressor.config_fields import ConfigField, config_fields

__all__ = ["byte_size", "click_options", "from_values", "given_flags"]

Config = TypeVar("Config")
UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def byte_size(text: str) -> int:
    """Returns the number of bytes of a size as people write it; raises click.BadParameter for what is no size.

    >>> byte_size("250000"), byte_size("1.5MB"), byte_size("1MiB")
    (250000, 1500000, 1048576)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.lower())
    if match is None or match[2] not in UNITS:
        raise click.BadParameter(f"{text!r} is no size: expected 250000, 250KB, 1.5MB or 1MiB")
    return int(float(match[1]) * UNITS[match[2]])


def click_options(config: type, *, overrides: bool = False) -> list[click.Option]:
    """Returns the options of the described fields of a config, in order.

    Args:
        overrides: whether an option that is not given is None, because something else, such as a recipe, says then
            what holds; the help still names the default.
    """
    return [_option(one, overrides) for one in config_fields(config) if one.on_command_line]


def from_values(config: type[Config], values: Mapping[str, Any], **more: Any) -> Config:
    """Builds a config from those of a command's values that are its own, and more arguments."""
    names = {one.name for one in config_fields(config)}
    return config(**more, **{name: value for name, value in values.items() if name in names})


def given_flags(config: Any, *names: str) -> list[str]:
    """Returns the flags of those of some fields of a config that were given."""
    flags = {one.name: one.flag for one in config_fields(type(config))}
    values = {name: getattr(config, name) for name in names}
    return [flags[name] for name, value in values.items() if value not in (None, ()) and value is not False]


def _option(one: ConfigField, override: bool) -> click.Option:
    settings: dict[str, Any] = {"help": one.help, "metavar": one.metavar}
    if override:
        settings["help"] += f" [default: {_default(one)}]"
    elif one.type is not bool and one.default is not None and one.default != ():
        settings |= {"default": one.default, "show_default": True}
    if one.type is bool:
        settings["is_flag"] = True
    else:
        settings |= {"type": _click_type(one), "multiple": one.default == ()}
    return click.Option([*one.spellings, one.name], **{**settings, **one.click})


def _default(one: ConfigField) -> str:
    """Writes a default for the help text.

    >>> _default(ConfigField(help="", default=0.001, from_scratch=1.0)), _default(ConfigField(help="", default="adamw"))
    ('0.001; from scratch 1', 'adamw')
    """
    defaults = [one.default] if one.from_scratch is None else [one.default, one.from_scratch]
    return "; from scratch ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in defaults)


def _click_type(one: ConfigField) -> Any:
    if one.choices:
        return Word(one.choices)
    if one.type is Path:
        return click.Path(path_type=Path)
    if one.type in (int, float) and one.bounds:
        least, most = (one.gt if one.ge is None else one.ge), (one.lt if one.le is None else one.le)
        limits: dict[str, Any] = {"min": least, "max": most}
        limits |= {"min_open": one.gt is not None, "max_open": one.lt is not None}
        return WholeNumber(**limits) if one.type is int else Number(**limits)
    return one.type if one.type in (int, float) else str
