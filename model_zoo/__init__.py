"""The recipes and packed checkpoints that ship with the package."""

from __future__ import annotations

from importlib import resources

from compressor.formats.errors import MissingError, did_you_mean
from compressor.model_zoo.index import Checkpoint, checkpoint, list_checkpoints, load, packed_path

__all__ = ["Checkpoint", "checkpoint", "list_checkpoints", "list_recipes", "load", "packed_path", "recipe_text"]

_FOLDER = resources.files(__name__) / "recipes"


def list_recipes() -> list[str]:
    """Returns the names of the shipped recipes, sorted.

    >>> "learnt4" in list_recipes()
    True
    """
    return sorted(entry.name.removesuffix(".toml") for entry in _FOLDER.iterdir() if entry.name.endswith(".toml"))


def recipe_text(name: str) -> str:
    """Returns the TOML text of a shipped recipe.

    Args:
        name: one of ``list_recipes``.

    Raises:
        MissingError: there is no such recipe; the message suggests the nearest name.

    Example:
        >>> "[[stage" in recipe_text("learnt4")
        True
    """
    if name not in list_recipes():
        known = ", ".join(list_recipes())
        raise MissingError(f"no recipe {name!r}.{did_you_mean(name, list_recipes())} Shipped recipes: {known}.")
    return (_FOLDER / f"{name}.toml").read_text(encoding="utf-8")
