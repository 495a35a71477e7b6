"""Objects of the metadata that tell how a file is to be used and how it was made, checked by type and range.

What passes can be used and shown without another check; only the texts of provenance have to be escaped when shown.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from compressor.formats.errors import FormatError

__all__ = ["OBJECTS", "PREPROCESSING", "check_object"]

MAX_NAME = 128  # characters of a model's name
MAX_ARGS = 64  # arguments of a model
MAX_CHANNELS, MAX_IMAGE = 4_096, 1 << 24  # channels of an image, and values of a whole one
MAX_CLASSES, MAX_LABEL = 1_000_000, 200  # names of classes, and characters of each
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


@dataclass(frozen=True)
class Field:
    """A value of an object.

    Args:
        fits: whether a JSON value can be its value.
        expected: what messages say it should be.
    """

    fits: Callable[[Any], bool]
    expected: str


def _is_int(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _is_number(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high


def _is_list(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(of, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


def _is_image(value: Any) -> bool:
    sizes = _is_list(value, lambda size: _is_int(size, 1, MAX_IMAGE)) and len(value) == 3
    return sizes and value[0] <= MAX_CHANNELS and math.prod(value) <= MAX_IMAGE


def _is_label(value: Any) -> bool:
    return _is_text(value) and len(value) <= MAX_LABEL and value.isprintable()


def _per_channel(low: float, high: float) -> Field:
    def fits(value: Any) -> bool:
        return _is_list(value, lambda number: _is_number(number, low, high)) and 1 <= len(value) <= MAX_CHANNELS

    return Field(fits, f"a list of a number per channel, each from {low:g} to {high:g}")


def _one_of(words: tuple[str, ...]) -> Field:
    return Field(lambda value: isinstance(value, str) and value in words, ", ".join(words))


def _is_model_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME


def _is_args(value: Any) -> bool:
    return isinstance(value, dict) and len(value) <= MAX_ARGS and all(map(_IDENTIFIER.fullmatch, value))


def _is_rule(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_text(value.get(key, "")) for key in ("match", "scheme"))


def _is_stage(value: Any) -> bool:
    return isinstance(value, dict) and _is_list(value.get("rule", []), _is_rule)


def _is_accuracy(value: Any) -> bool:
    if not isinstance(value, dict) or "packed" not in value:
        return False
    return _is_number(value["packed"], 0, 1) and (value.get("dense") is None or _is_number(value["dense"], 0, 1))


def _is_data(value: Any) -> bool:
    if not isinstance(value, dict) or not all(_is_text(value.get(key)) for key in ("name", "version", "split")):
        return False
    return _is_int(value.get("n"), 0, 1 << 62)


MODEL = {
    "name": Field(_is_model_name, f"1 to {MAX_NAME} characters"),
    "args": Field(_is_args, f"an object of at most {MAX_ARGS} arguments by name"),
}
PREPROCESSING = {
    "input_size": Field(_is_image, f"[channels, height, width], {MAX_IMAGE:,} values at most"),
    "mean": _per_channel(-1e6, 1e6),
    "std": _per_channel(1e-6, 1e6),
    "interpolation": _one_of(INTERPOLATIONS),
    "crop_pct": Field(lambda value: _is_number(value, 0.1, 10), "a number from 0.1 to 10"),
    "crop_mode": _one_of(CROP_MODES),
    "label_names": Field(
        lambda value: _is_list(value, _is_label) and 1 <= len(value) <= MAX_CLASSES,
        f"a list of a name per class, each of at most {MAX_LABEL} printable characters",
    ),
}
"""Fields of ``preprocessing``."""
RECIPE = {"stage": Field(lambda value: _is_list(value, _is_stage), "a list of stages, each with a list of rules")}
PROVENANCE = {
    "sqnr": Field(
        lambda value: _is_list(value, lambda one: one is None or _is_number(one, -1e6, 1e6)), "a list of numbers in dB"
    ),
    "rules": Field(lambda value: _is_list(value, lambda one: _is_int(one, 0, 1 << 31)), "a list of positions"),
    "left": Field(_is_texts, "an object of texts"),
    "parameters": Field(lambda value: _is_int(value, 0, 1 << 62), "a whole number of 0 or more"),
    "seed": Field(lambda value: _is_int(value, -(1 << 63), 1 << 64), "a whole number of 64 bits"),
    "top1": Field(_is_accuracy, "shares 'packed' and 'dense', each from 0 to 1"),
    "data": Field(_is_data, "'name', 'version', 'split' and the number 'n'"),
    "versions": Field(_is_texts, "an object of texts"),
}
OBJECTS: Mapping[str, Mapping[str, Field]] = {
    "model": MODEL, "preprocessing": PREPROCESSING, "recipe": RECIPE, "provenance": PROVENANCE,
}  # fmt: skip
"""The fields of each object; provenance may have others, which are only recorded."""


def check_object(key: str, value: Any) -> None:
    """Checks one of ``OBJECTS``: its fields by type and range, and all texts but those of provenance.

    Args:
        key: which of them.
        value: a JSON value.

    Raises:
        FormatError: it is none, or is empty, a field is unknown or cannot have its value, or a text has control
            characters. In provenance there may be any fields and texts besides.
    """
    if not isinstance(value, dict) or not value:
        raise FormatError(f"metadata: {key!r} is not an object, or an empty one")
    fields = OBJECTS[key]
    missing = [name for name in fields if key == "model" and name not in value]
    unknown = [name for name in value if key != "provenance" and name not in fields]
    if missing or unknown:
        fault = f"unknown field {ascii(unknown[0])[:80]}" if unknown else f"no {missing[0]!r}"
        raise FormatError(f"metadata: {key}: {fault}, expected {', '.join(fields)}")
    for name, field in fields.items():
        if name in value and not field.fits(value[name]):
            raise FormatError(f"metadata: {key}: {name} is {ascii(value[name])[:80]}, expected {field.expected}")
    if key != "provenance":
        for text in _texts(value):
            if not text.isprintable():
                raise FormatError(f"metadata: {key}: {ascii(text)[:80]} has control characters")


def _texts(value: Any) -> Iterator[str]:
    """Yields all texts of a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, child in value.items():
            yield key
            yield from _texts(child)
    elif isinstance(value, list):
        for child in value:
            yield from _texts(child)
