"""The codecs by id: the modules of this folder, and those of other packages (see docs/plug-in-package.md)."""

from __future__ import annotations

from typing import TypeVar

from compressor.formats.codecs.base import Codec
from compressor.formats.errors import UnsupportedError
from compressor.formats.registry import Registry

__all__ = ["CODECS", "codec_class", "register"]

CODECS: Registry[Codec] = Registry(
    "codec", "compressor.formats.codecs", "timm_compressor.codecs", UnsupportedError, reserved=("auto",)
)
"""Every codec class by its id."""

C = TypeVar("C", bound=type[Codec])


def register(cls: C) -> C:
    """Adds a codec class to ``CODECS`` under its id; a class decorator.

    Raises:
        UsageError: the id is taken or cannot be used, or the class leaves out a function of the contract.
    """
    CODECS.register(cls.id, cls)
    return cls


def codec_class(name: str) -> type[Codec]:
    """Returns the codec class of an id.

    Raises:
        UnsupportedError: no codec has this id; the message names the nearest that exists.
        UsageError: another package offers it, and cannot be imported.
    """
    return CODECS.find(name)
