"""Names that nothing has, refused before torch is imported, which takes seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules

from compressor.formats.errors import PolicyError, UsageError, did_you_mean
from compressor.models.known_names import check_kept

__all__ = ["check_codec", "check_models", "check_recipe", "check_scheme", "scheme_names"]


def check_models(names: Iterable[str | None]) -> None:
    """Raises the error for a name that no model has, where that is known without torch.

    Where torch is there already, nothing is gained, and timm itself will say so.

    Args:
        names: of timm models; None is passed over.
    """
    if "torch" not in sys.modules:
        for name in filter(None, names):
            check_kept(name)


def check_scheme(name: str | None) -> None:
    """Raises PolicyError for a name that no scheme has; None is passed over."""
    if name is not None and name not in (known := scheme_names()):
        raise PolicyError(f"no scheme {name!r}.{did_you_mean(name, known)} Known schemes: {', '.join(known)}.")


def check_codec(name: str) -> None:
    """Raises UsageError for a name that no codec for any tensor has."""
    if name == "auto":  # reading the codecs takes a while
        return
    from compressor.formats.codecs.registry import CODECS

    if name not in CODECS or not CODECS[name].general:
        known = ["auto", *(one for one in sorted(CODECS) if CODECS[one].general)]
        shown = ", ".join(["auto (the smallest)", *known[1:]])
        raise UsageError(f"--codec {name}: no such codec.{did_you_mean(name, known)} Known: {shown}")


def check_recipe(name: str | None) -> None:
    """Raises MissingError for a name that no shipped recipe or checkpoint has; None, and files, are passed over."""
    from compressor import model_zoo

    if name is not None and not model_zoo.packed_path(name).suffix:
        model_zoo.recipe_text(name)


def scheme_names() -> list[str]:
    """Returns the ids of all schemes: built-in ones have the names of their modules, others those of entry points."""
    modules = iter_modules(import_module("compressor.schemes").__path__)
    return sorted({module.name for module in modules} | {e.name for e in entry_points(group="timm_compressor.schemes")})
