"""Which classes a packed model answers otherwise than the dense one: what was right and is wrong, and the reverse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, Field

from compressor.formats.errors import printable

__all__ = ["ClassFlips"]

Text = Annotated[str, AfterValidator(printable)]
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class ClassFlips:
    """The images of a class, and how many of them two models get right.

    Args:
        name: of the class.
        images: number of its images.
        dense, packed: those that the dense model gets right, and the packed one.
        lost, gained: those that only the dense model gets right, and only the packed one.
    """

    name: Text
    images: Count
    dense: Count
    packed: Count
    lost: Count
    gained: Count
