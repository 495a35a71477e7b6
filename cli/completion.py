"""Values that a shell completes, once ``eval "$(_COMPRESS_COMPLETE=bash_source compress)"`` has turned it on.

Each list is read only when a value of it is completed; models take the time of importing timm, once for each version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import click
from click.shell_completion import CompletionItem

__all__ = ["checkpoints", "codecs", "completing", "models", "recipes", "schemes"]

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def completing(names: Callable[[], Iterable[str]], files: bool = False) -> Complete:
    """Returns click's ``shell_complete``, which completes these names.

    Args:
        names: returns them.
        files: whether paths are completed where no name begins so.
    """

    def complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        del ctx, parameter
        found = [CompletionItem(name) for name in sorted(names()) if name.startswith(incomplete)]
        return found or ([CompletionItem(incomplete, type="file")] if files else [])

    return complete


def schemes() -> Iterable[str]:
    """Returns the ids of all schemes."""
    from compressor.cli.spelling import scheme_names

    return scheme_names()


def codecs() -> Iterable[str]:
    """Returns the ids of all codecs, and auto."""
    from compressor.formats.codecs.registry import CODECS

    return ("auto", *CODECS)


def recipes() -> Iterable[str]:
    """Returns the names of the shipped recipes, and of the checkpoints, whose recipes are run again."""
    from compressor.model_zoo import list_recipes

    return (*list_recipes(), *checkpoints())


def checkpoints() -> Iterable[str]:
    """Returns the names of the shipped checkpoints, as a command takes them."""
    from compressor.model_zoo.index import PREFIX, list_checkpoints

    return (PREFIX + name for name in list_checkpoints())


def models() -> Iterable[str]:
    """Returns timm's models."""
    from compressor.models.known_names import keep_names, kept_names

    names = kept_names()
    if names is None:
        import timm

        keep_names(names := timm.list_models())
    return names
