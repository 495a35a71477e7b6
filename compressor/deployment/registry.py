"""The export targets by id: the modules of ``targets/``, and those of other packages (see docs/plug-in-package.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from importlib.util import find_spec
from typing import Any, TypeVar

from compressor.deployment.target import Target
from compressor.formats.errors import MissingError, UsageError, did_you_mean
from compressor.formats.registry import Registry

__all__ = ["REFUSED", "TARGETS", "describe", "make_target", "register"]

TARGETS: Registry[Target] = Registry("target", "compressor.targets", "timm_compressor.targets", UsageError)
"""Every target class by its id."""

_UNPACK = "'compress unpack FILE -o FOLDER' writes the plain checkpoint that its own tools start from"
REFUSED = {
    "gguf": f"GGUF has number formats of its own and no tables of values; {_UNPACK}",
    "compressed-tensors": f"compressed-tensors has no tables of values; {_UNPACK}",
    "bitsandbytes": f"bitsandbytes has one table of its own, and takes no other; {_UNPACK}",
    "mlx": f"MLX quantises to evenly spaced values and takes no tables; {_UNPACK}",
}
"""Why there is no target of a name that many ask for, and what to do instead."""

T = TypeVar("T", bound=type[Target])


def register(cls: T) -> T:
    """Adds a target class to ``TARGETS`` under its id; a class decorator.

    Raises:
        UsageError: the id is taken or cannot be used, or the class leaves out a function of the contract.
    """
    TARGETS.register(cls.id, cls)
    return cls


def make_target(name: str, settings: Mapping[str, Any]) -> Target:
    """Returns a target by its id, with these settings in place of its defaults.

    Raises:
        UsageError: there is no such target, or it has no such setting; the message says what there is instead.
        MissingError: a package that it needs is not installed; the message says how to install it.

    Example:
        >>> make_target("reader", {}).suffix
        '.py'
    """
    if reason := REFUSED.get(name.lower().removeprefix(".")):
        raise UsageError(f"a packed file cannot be exported to {name!r}: {reason}")
    cls = TARGETS.find(name)
    known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    for key in settings:
        if key not in known:
            has = f"Its settings: {', '.join(known)}" if known else "It has none"
            raise UsageError(f"target {name!r} has no setting {key!r}.{did_you_mean(key, known)} {has}.")
    if missing := [package for package in cls.packages if find_spec(package) is None]:
        needs = f"target {name!r} needs {', '.join(missing)}"
        raise MissingError(f"{needs}, not installed here: python -m pip install '{cls.install}'")
    return cls(**settings)


def describe(cls: type[Target]) -> dict[str, Any]:
    """Returns id, first docstring line (``summary``), settings with their defaults, needs and limits of a target."""
    summary = (cls.__doc__ or cls.__name__).strip().splitlines()[0]
    settings = {field.name: field.default for field in fields(cls)}  # type: ignore[arg-type]
    return {"id": cls.id, "summary": summary, "settings": settings, "install": cls.install, "limits": cls.limits}
