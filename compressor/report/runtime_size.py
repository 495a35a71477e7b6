"""How many bytes a packed file takes in the form of another runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["RuntimeSize"]


@dataclass(frozen=True)
class RuntimeSize:
    """The size of one export.

    Args:
        target: id of the target of the export.
        what: the target writes, in a sentence.
        bytes: of the file and of its companions; None where it could not be written.
        why_not: why it could not be written; "" where it was.
        layers: name, bytes before coding and after it, of each layer, where no file is written and they are estimated.
    """

    target: str
    what: str
    bytes: int | None
    why_not: str = ""
    layers: Sequence[tuple[str, int, int]] = ()
