"""The folder where what takes long to make is kept from one run to the next."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_dir"]


def cache_dir() -> Path:
    """Returns ``$TIMM_COMPRESSOR_CACHE``, else ``timm-compressor`` in ``$XDG_CACHE_HOME``, else in ``~/.cache``."""
    if folder := os.environ.get("TIMM_COMPRESSOR_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "timm-compressor"
