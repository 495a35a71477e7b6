"""Types of values on the command line, whose refusals say what was given, what is expected, and the nearest name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import click

from compressor.formats.errors import did_you_mean

__all__ = ["Number", "WholeNumber", "Word"]


class Word(click.Choice[str]):
    """One of a few words."""

    def __init__(self, words: Iterable[str]) -> None:
        super().__init__(list(words))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Returns the word."""
        if value not in self.choices:
            hint = did_you_mean(str(value), self.choices)
            self.fail(f"{value!r}, expected {_either(self.choices)}.{hint}", param, ctx)
        return str(value)


class WholeNumber(click.IntRange):
    """A whole number, within bounds where it has some."""

    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Returns the number."""
        try:
            return int(super().convert(value, param, ctx))
        except click.BadParameter:
            _refuse(self, value, "a whole number", param, ctx)


class Number(click.FloatRange):
    """A number, within bounds where it has some."""

    name = "float"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Returns the number."""
        try:
            return float(super().convert(value, param, ctx))
        except click.BadParameter:
            _refuse(self, value, "a number", param, ctx)


def _refuse(
    bounded: WholeNumber | Number, value: Any, what: str, param: click.Parameter | None, ctx: click.Context | None
) -> NoReturn:
    least = [] if bounded.min is None else [f" {'above' if bounded.min_open else 'at least'} {bounded.min:.12g}"]
    most = [] if bounded.max is None else [f" {'below' if bounded.max_open else 'at most'} {bounded.max:.12g}"]
    bounded.fail(f"{value!r}, expected {what}{' and'.join(least + most)}", param, ctx)


def _either(words: Iterable[str]) -> str:
    """Returns words as alternatives.

    >>> _either(["f32", "f16"]), _either(["a", "b", "c"]), _either(["tensorboard"])
    ('f32 or f16', 'a, b or c', 'tensorboard')
    """
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last
