"""Names that no model and no scheme has, refused before torch is imported, which takes seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules

from compressor.formats.errors import PolicyError, did_you_mean
from compressor.models.known_names import check_kept

__all__ = ["check_names", "scheme_names"]


def check_names(models: Iterable[str | None], scheme: str | None) -> None:
    """Raises the error for a name that does not exist, where that is known without torch.

    Where torch is there already, nothing is gained, and the registries themselves will say so.

    Args:
        models: names of timm models; None is passed over.
        scheme: id of a scheme; None: none is named.
    """
    if "torch" in sys.modules:
        return
    for model in filter(None, models):
        check_kept(model)
    if scheme is not None and scheme not in (known := scheme_names()):
        raise PolicyError(f"no scheme {scheme!r}.{did_you_mean(scheme, known)} Known schemes: {', '.join(known)}.")


def scheme_names() -> list[str]:
    """Returns the ids of all schemes: built-in ones have the names of their modules, others those of entry points."""
    modules = iter_modules(import_module("compressor.schemes").__path__)
    return sorted({module.name for module in modules} | {e.name for e in entry_points(group="timm_compressor.schemes")})
