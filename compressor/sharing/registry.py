"""The schemes by id: the modules of ``schemes/``, and those of other packages (see docs/plug-in-package.md)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any, TypeVar, cast

from compressor.formats.errors import PolicyError, did_you_mean
from compressor.formats.registry import Registry
from compressor.sharing.scheme import Scheme
from compressor.validation import one_line_errors

__all__ = ["SCHEMES", "describe", "make_scheme", "register", "scheme_settings"]

SCHEMES: Registry[Scheme] = Registry("scheme", "compressor.schemes", "timm_compressor.schemes", PolicyError)
"""Every scheme class by its id."""

S = TypeVar("S")


def register(cls: type[S]) -> type[S]:
    """Adds a scheme class to ``SCHEMES`` under its id; a class decorator.

    Raises:
        UsageError: the id is taken or cannot be used, or the class leaves out a function of the contract.
    """
    scheme = cast(type[Scheme], cls)  # pydantic's decorator hides the base class from the type checker
    SCHEMES.register(scheme.id, scheme)
    scheme.__repr__ = _brief  # type: ignore[method-assign,assignment]
    scheme.__init__ = _in_one_line(scheme.__init__, scheme.id)  # type: ignore[method-assign]
    return cls


def _in_one_line(init: Callable[..., None], name: str) -> Callable[..., None]:
    """Returns a constructor that refuses a wrong setting as a rule does, in one line."""

    @functools.wraps(init)
    def checked(self: Scheme, *args: Any, **settings: Any) -> None:
        with one_line_errors(PolicyError, lambda setting: f"scheme {name!r}, setting {setting!r}"):
            init(self, *args, **settings)

    return checked


def _brief(scheme: Scheme) -> str:
    """Shows the settings that tell a scheme from others, as Python has them."""
    settings = ", ".join(f"{name}={value!r}" for name, value in scheme.brief_settings.items())
    return f"{type(scheme).__name__}({settings})"


def make_scheme(name: str, settings: Mapping[str, Any]) -> Scheme:
    """Returns a scheme by its id, with these settings in place of its defaults.

    Args:
        name: id of the scheme.
        settings: value by field name; ``bits`` stands for what ``Scheme.settings_for_bits`` says.

    Raises:
        PolicyError: no scheme or no setting has this name (the message names the nearest), or a value is out of range
            or contradicts another.
        UsageError: another package offers the scheme, and cannot be imported.

    Example:
        >>> make_scheme("kmeans", {"bits": 2})
        KMeans(codewords=4)
    """
    cls = SCHEMES.find(name)
    known_settings = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for key in settings:
        if key not in (*known_settings, "bits"):
            near = did_you_mean(key, [*known_settings, "bits"])
            has = ", ".join(known_settings)
            raise PolicyError(f"scheme {name!r} has no setting {key!r}.{near} Its settings: {has}.")
    given = dict(settings)
    if "bits" in given:
        given = {**cls.settings_for_bits(_whole(name, given.pop("bits"))), **given}
    return cls(**given).checked()


def _whole(name: str, bits: Any) -> int:
    if not isinstance(bits, int) or isinstance(bits, bool):
        raise PolicyError(f"scheme {name!r}: bits must be a whole number, got {bits!r}")
    return bits


def scheme_settings(scheme: Scheme) -> dict[str, Any]:
    """Returns all settings of a scheme by field name, as values that TOML can hold: the inverse of ``make_scheme``."""
    settings = asdict(scheme)  # type: ignore[call-overload]
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def describe(cls: type[Scheme]) -> dict[str, Any]:
    """Returns id, first docstring line (``summary``), settings with their defaults, and paper of a scheme class."""
    given = {f.name: f.default for f in fields(cls) if f.default is not MISSING}  # type: ignore[arg-type]
    defaults = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    summary = (cls.__doc__ or cls.__name__).strip().splitlines()[0]
    return {"id": cls.id, "summary": summary, "settings": defaults, "paper": cls.paper}
