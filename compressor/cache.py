"""The folder where what takes long to make is kept from one run to the next."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_dir"]


def cache_dir() -> Path:
    """Returns ``$TIMM_COMPRESSOR_CACHE``, else ``$XDG_CACHE_HOME/timm-compressor``, else ``~/.cache/timm-compressor``."""
    if folder := os.environ.get("TIMM_COMPRESSOR_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "timm-compressor"
