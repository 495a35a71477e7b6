"""What all JSON documents have in common: the version of their form, and the units of their numbers (docs/json.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["SCHEMA_VERSION", "with_units"]

SCHEMA_VERSION = 2
"""Counts up when a key changes its meaning or type, or goes; new keys may come at any time."""
BITS, BYTES, SHARE, SECONDS = "bits a weight", "bytes", "0 to 1", "seconds"
UNITS = {
    "seconds": SECONDS, "images_per_second": "images a second", "loss": "nats", "bits_per_parameter": "bits",
    "entropy": BITS, "coded": BITS, "sqnr": "dB", "zeros": SHARE, "fixed": SHARE, "changed": SHARE,
    "top1": SHARE, "top5": SHARE, "dense": BYTES, "file": BYTES, "indices": BYTES, "codebooks": BYTES,
    "codebook": BYTES, "untouched": BYTES, "header": BYTES, "checksums": BYTES, "overhead": BYTES, "gap_coded": BYTES,
    "size": BYTES, "target_size": BYTES, "least": BYTES, "predicted": BYTES, "bytes": BYTES, "dense_bytes": BYTES,
    "packed": BYTES, "exported": BYTES, "uncoded": BYTES, "per_tensor": BYTES, "per_channel": BYTES,
    "dense_top1": SHARE, "deviation": SHARE, "low": SHARE, "high": SHARE,
    "rate": "nats of an image a bit", "price": "nats of an image a bit",
}  # fmt: skip
"""By key; what is inside an object with a unit, such as ``top1``, has that unit or is one of ``COUNTS``."""
COUNTS = {"n", "lost", "gained"}
SETTINGS = {"model", "preprocessing", "recipe", "settings", "options", "command", "versions", "classes"}
"""Keys of objects whose keys are names of others', or that count images by class."""


def with_units(document: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a document with the version of its form first, and the units of its numbers by their dotted paths.

    Positions in lists are no part of a path; texts and truth values, whatever their key, have no unit.

    Example:
        >>> with_units({"sites": [{"coded": 1.5}]})
        {'schema_version': 2, 'units': {'sites.coded': 'bits a weight'}, 'sites': [{'coded': 1.5}]}
    """
    units = dict(sorted(_units(document, (), None)))
    return {"schema_version": SCHEMA_VERSION, "units": units, **document}


def _units(value: Any, path: tuple[str, ...], unit: str | None) -> set[tuple[str, str]]:
    """Returns path and unit of each number, or unknown number, in a value; ``unit`` is that of the objects around."""
    if isinstance(value, Mapping):
        known = [(str(key), item) for key, item in value.items() if key not in SETTINGS | COUNTS]
        return {one for key, item in known for one in _units(item, (*path, key), unit or UNITS.get(key))}
    if isinstance(value, list | tuple):
        return {one for item in value for one in _units(item, path, unit)}
    is_number = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    return {(".".join(path), unit)} if unit is not None and is_number else set()
