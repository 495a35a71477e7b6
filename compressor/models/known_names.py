"""The names of timm's models, kept in the cache, so that a misspelt one is found without the seconds of importing timm.

The list is that of the installed timm: it is made anew where the version or any file of its models is another.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from compressor.cache import cache_dir
from compressor.formats.errors import MissingError, ResourceError, UsageError, did_you_mean
from compressor.formats.io.atomic import write_atomically

__all__ = ["check_kept", "keep_names", "kept_names", "no_such_model"]


def kept_names() -> list[str] | None:
    """Returns the names of all models of the installed timm; None where they have not been kept yet."""
    path = _path()
    try:
        names = None if path is None else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def keep_names(names: list[str]) -> None:
    """Keeps the names of all models of the installed timm, where that is possible and has not been done.

    Args:
        names: as ``timm.list_models()`` returns them.
    """
    path = _path()
    if path is None or path.exists():
        return
    with suppress(OSError, ResourceError, UsageError):  # a cache that cannot be written costs only time
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob("timm-*.json"):
            stale.unlink()
        write_atomically(path, json.dumps(names).encode(), force=True)


def check_kept(name: str) -> None:
    """Raises MissingError for a name that no model has, as far as that is known without importing timm.

    Args:
        name: of a model, in any form that timm takes; only names of timm's own are looked up.
    """
    names = None if ":" in name else kept_names()
    if names is not None and name.partition(".")[0] not in names:
        raise no_such_model(name, names)


def no_such_model(name: str, names: list[str]) -> MissingError:
    """Returns the error for a name that timm does not know.

    Args:
        name: the name.
        names: those that it knows.
    """
    return MissingError(f"timm {version('timm')} has no model {name!r}.{did_you_mean(name, names)}")


def _path() -> Path | None:
    """Returns the file of the installed timm; None where it cannot be found."""
    spec = find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        return None
    with suppress(OSError):
        files = Path(spec.submodule_search_locations[0], "models").glob("*.py")
        newest = max((os.stat(file).st_mtime_ns for file in files), default=0)
        return cache_dir() / f"timm-{version('timm')}-{newest}.json"
    return None
