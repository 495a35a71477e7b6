"""Fields of a config: each states its bounds, help text and flags once.

Plain Python, so that ``compress --help`` is quick.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ConfigField", "config_field", "config_fields"]

_METADATA_KEY = "config field"


@dataclass(frozen=True, kw_only=True)
class ConfigField:
    """One field of a config, as validation and the command line see it.

    Args:
        name: of the field.
        type: of its values; for ``X | None`` it is X.
        default: of the field.
        help: a full phrase; it becomes the help text of the option.
        ge, gt, le, lt: bounds of a number.
        choices: the words allowed; empty: any.
        metavar: shown in the help in place of the type.
        flags: spellings on the command line; empty: ``--`` and the name.
        on_command_line: False for a field that only recipes and Python can set.
        from_scratch: the default of a training that starts from random weights; None: the same.
        click: further arguments of ``click.Option``.
    """

    name: str = ""
    type: Any = str
    default: Any = None
    help: str
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    flags: tuple[str, ...] = ()
    on_command_line: bool = True
    from_scratch: Any = None
    click: Mapping[str, Any] = field(default_factory=dict)

    @property
    def spellings(self) -> tuple[str, ...]:
        """The flags on the command line."""
        return self.flags or ("--" + self.name.replace("_", "-"),)

    @property
    def flag(self) -> str:
        """The first long flag, by which messages name the field."""
        return next(flag for flag in self.spellings if flag.startswith("--"))

    @property
    def bounds(self) -> dict[str, float]:
        """The bounds that are set, by name."""
        bounds = {"ge": self.ge, "gt": self.gt, "le": self.le, "lt": self.lt}
        return {name: bound for name, bound in bounds.items() if bound is not None}


def config_field(default: Any, help: str, **details: Any) -> Any:  # noqa: A002 (click's word)
    """Returns a dataclass field described by the arguments of ``ConfigField``."""
    return field(default=default, metadata={_METADATA_KEY: ConfigField(help=help, **details)})


def config_fields(config: type) -> list[ConfigField]:
    """Returns the described fields of a dataclass, in order.

    Example:
        >>> @dataclass(frozen=True)
        ... class Heating:
        ...     celsius: float | None = config_field(None, "Temperature of the room, in degrees.", ge=0)
        >>> [(one.name, one.type, one.flag, one.bounds) for one in config_fields(Heating)]
        [('celsius', <class 'float'>, '--celsius', {'ge': 0})]
    """
    hints = typing.get_type_hints(config)
    return [
        dataclasses.replace(
            one.metadata[_METADATA_KEY], name=one.name, type=_not_none(hints[one.name]), default=one.default
        )
        for one in dataclasses.fields(config)
        if _METADATA_KEY in one.metadata
    ]


def _not_none(hint: Any) -> Any:
    """Returns X for ``X | None``, and any other type unchanged."""
    if isinstance(hint, types.UnionType):
        return next(one for one in typing.get_args(hint) if one is not types.NoneType)
    return hint
