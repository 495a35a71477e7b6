"""Words of messages: numbers with their nouns. Nothing here imports torch."""

from __future__ import annotations

__all__ = ["counted"]


def counted(number: int, noun: str, plural: str = "") -> str:
    """Returns a number and its noun, singular or plural.

    Args:
        number: the number.
        noun: for one of them.
        plural: for any other number; "": the noun and s.

    Example:
        >>> counted(1, "epoch"), counted(1_200, "image"), counted(0, "class", "classes")
        ('1 epoch', '1,200 images', '0 classes')
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
