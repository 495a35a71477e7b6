"""Validation by pydantic, with errors of one line."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from compressor.config_fields import config_fields
from compressor.formats.errors import CompressorError

__all__ = ["one_line_errors", "validate_config"]

KINDS = {
    "int": "a whole number", "int_from": "a whole number", "float": "a number", "finite": "a finite number",
    "bool": "true or false", "string": "a text", "list": "a list", "tuple": "a list", "dict": "a table",
    "mapping": "a table", "model": "a table", "dataclass": "a table",
}  # fmt: skip
"""What is expected, by the first words of the kind of a fault."""
BOUNDS = {
    "greater_than": ("gt", "a number above"), "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "a number below"), "less_than_equal": ("le", "at most"),
}  # fmt: skip
"""The name and the words of a bound."""


@contextmanager
def one_line_errors(
    error: type[CompressorError], describe: Callable[[str], str], *, show_value: bool = True
) -> Iterator[None]:
    """Rewrites the first fault of a pydantic ValidationError raised inside into one line.

    Args:
        error: the type to raise instead.
        describe: names the place of the fault, given its path, such as ``rule.bits``; "" for the whole.
        show_value: whether the line ends with the value; False where it is too long, or hostile.

    Raises:
        CompressorError: of the type ``error``, for a ValidationError.
    """
    try:
        yield
    except ValidationError as exc:
        first = exc.errors()[0]
        place = describe(".".join(map(str, first["loc"])))
        is_there = first["type"] not in ("missing", "extra_forbidden", "unexpected_keyword_argument")
        value = f", got {first['input']!r}" if show_value and is_there else ""
        raise error(f"{place}: {_expected(first)}{value}") from None


def _expected(fault: Mapping[str, Any]) -> str:
    """Returns what a value should have been, in words that need no Python."""
    kind, context = fault["type"], fault.get("ctx", {})
    if kind == "missing":
        return "is missing"
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return "is not known"
    if kind in BOUNDS:
        name, words = BOUNDS[kind]
        return f"expected {words} {context[name]:g}"
    if kind == "literal_error":
        return f"expected {context['expected']}"
    what = KINDS.get(kind) or KINDS.get(kind.rpartition("_")[0])
    return fault["msg"].removeprefix("Value error, ") if what is None else f"expected {what}"


def validate_config(config: type, values: Mapping[str, Any], error: type[CompressorError]) -> dict[str, Any]:
    """Returns the values of a config's described fields, each converted to the field's type.

    Raises:
        CompressorError: of the type ``error``, for a value of another type or out of bounds.
    """
    with one_line_errors(error, str):
        return _model_of(config).model_validate({name: _plain(value) for name, value in values.items()}).model_dump()


def _plain(value: Any) -> Any:
    """Returns numpy's whole numbers as Python's, which alone are strict integers to pydantic."""
    return value if isinstance(value, bool | int) or not hasattr(value, "__index__") else operator.index(value)


@functools.cache
def _model_of(config: type) -> type[BaseModel]:
    """Builds the pydantic model of a config; whole numbers are strict, for 3.0 or "3" epochs are a mistake."""
    fields: dict[str, Any] = {}
    for one in config_fields(config):
        limits: dict[str, Any] = {**one.bounds, **({"allow_inf_nan": False} if one.type is float else {})}
        fields[one.name] = (one.type, Field(one.default, strict=one.type is int, **limits))
    return create_model(config.__name__, __config__=ConfigDict(extra="forbid"), **fields)
