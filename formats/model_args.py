"""Arguments of ``timm.create_model`` that a packed file may hold (SPEC.md, 2).

Whatever a file says, building its model must not read a file, reach the network or run code of the file's choice. So
arguments are JSON, strings are single words such as ``silu``, numbers are bounded, and names by which timm reads,
downloads, places or wraps something are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["fault_of_args"]

_REFUSED = {
    "model_name", "checkpoint_path", "cache_dir", "pruned", "features_only", "out_indices", "feature_cls",
    "feature_cfg", "kwargs_filter", "model_cfg", "model_cls", "variant", "cfg", "device", "dtype", "scriptable",
    "exportable", "no_jit",
}  # fmt: skip
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_WORD = re.compile(r"[A-Za-z0-9_-]{0,32}")  # no dot, slash or colon: neither a path nor a URL nor a dotted name
_RANGES = {
    "num_classes": (0, 1_000_000, 0),
    "in_chans": (1, 4_096, 0),
    "img_size": (1, 8_192, 2),
    "patch_size": (1, 1_024, 2),
    "depth": (0, 1_024, 64),
    "depths": (0, 1_024, 64),
    "layers": (0, 1_024, 64),
}
"""Least and greatest value, and the greatest length of a list, 0 where there must be none."""
_MAX_INT = 65_536
_MAX_FLOAT = 1e9
_MAX_VALUES = 256  # of all lists and objects of one argument
_MAX_LEVELS = 4


def fault_of_args(args: Mapping[str, Any]) -> str:
    """Returns what is wrong with arguments, "" where a packed file may hold them.

    Args:
        args: the arguments by name; tuples count as lists.

    Example:
        >>> fault_of_args({"act_layer": "silu", "embed_dim": 192, "depths": (2, 2)})
        ''
        >>> fault_of_args({"checkpoint_path": "weights"})
        "checkpoint_path = 'weights' is not allowed: timm would read, download, place or wrap something by it"
    """
    for key, value in args.items():
        reason = _fault_of_name(key) or (_fault_of_range(key, value) if key in _RANGES else _fault_of_value(value))
        if reason:
            return f"{ascii(key)[1:-1][:80]} = {ascii(value)[:80]} is not allowed{reason}"
    return ""


def _fault_of_name(key: Any) -> str:
    if not isinstance(key, str) or not _NAME.fullmatch(key):
        return ": expected a name of letters, digits and underscores"
    if key in _REFUSED or key.startswith("pretrained"):
        return ": timm would read, download, place or wrap something by it"
    return ""


def _fault_of_range(key: str, value: Any) -> str:
    low, high, length = _RANGES[key]
    values = value if isinstance(value, list | tuple) and 0 < len(value) <= length else [value]
    if value is None or all(type(one) is int and low <= one <= high for one in values):
        return ""
    return f", expected {f'1 to {length} whole numbers' if length else 'a whole number'} from {low} to {high:,}"


def _fault_of_value(value: Any) -> str:
    values = list(_flat(value, 0))
    if len(values) > _MAX_VALUES:
        return f", expected at most {_MAX_VALUES} values, in at most {_MAX_LEVELS} levels"
    for one in values:
        if isinstance(one, str):
            if not _WORD.fullmatch(one):
                return ", expected a word of at most 32 letters, digits, _ and -"
        elif isinstance(one, float):
            if not (math.isfinite(one) and abs(one) <= _MAX_FLOAT):
                return f", expected a finite number of at most {_MAX_FLOAT:g}"
        elif type(one) is int:
            if abs(one) > _MAX_INT:
                return f", expected a whole number of at most {_MAX_INT:,}"
        elif one is not None and type(one) is not bool:
            return ", expected JSON: numbers, words, lists; a layer by timm's name, such as act_layer='silu'"
    return ""


def _flat(value: Any, level: int) -> Any:
    """Yields keys and values of nested lists and objects, and too many of them where they are nested too deeply."""
    if not isinstance(value, list | tuple | dict):
        yield value
    elif level == _MAX_LEVELS:
        yield from [None] * (_MAX_VALUES + 1)
    else:
        yield from value if isinstance(value, dict) else ()
        for one in value.values() if isinstance(value, dict) else value:
            yield from _flat(one, level + 1)
