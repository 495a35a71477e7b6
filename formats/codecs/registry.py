"""The codecs there are, by id: the modules of this folder, and those of other packages (CONTRIBUTING.md)."""

from __future__ import annotations

from typing import TypeVar

from compressor.formats.codecs.base import Codec
from compressor.formats.errors import UnsupportedError
from compressor.formats.registry import Registry

__all__ = ["CODECS", "codec_class", "register"]

CODECS: Registry[Codec] = Registry("codec", "compressor.formats.codecs", "timm_compressor.codecs", UnsupportedError)
C = TypeVar("C", bound=type[Codec])


def register(cls: C) -> C:
    """Adds a codec class to ``CODECS`` under its id, which must be free; a class decorator."""
    CODECS.register(cls.id, cls)
    return cls


def codec_class(name: str) -> type[Codec]:
    """Returns the codec of an id; raises UnsupportedError with the nearest known id."""
    return CODECS.find(name)
