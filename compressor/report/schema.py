"""What all JSON documents have in common: the version of their form, and the units of their numbers (docs/json.md)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    "size": BYTES, "least": BYTES, "bytes": BYTES, "dense_bytes": BYTES, "packed": BYTES, "exported": BYTES,
    "dense_top1": SHARE, "low": SHARE, "high": SHARE,
    "rate": "nats of an image a bit", "price": "nats of an image a bit",
}  # fmt: skip
"""By key; what is inside an object with a unit, such as ``top1``, has that unit or is a count."""


def with_units(document: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a document with the version of its form first, and the units of those of its keys that have one.

    Example:
        >>> with_units({"sites": [{"coded": 1.5}]})
        {'schema_version': 2, 'units': {'coded': 'bits a weight'}, 'sites': [{'coded': 1.5}]}
    """
    units = {key: UNITS[key] for key in sorted(set(_keys(document)))}
    return {"schema_version": SCHEMA_VERSION, "units": units, **document}


def _keys(value: Any) -> Iterator[str]:
    """Yields the keys at any depth that have a unit, but none inside of another or among counts of images."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key in UNITS:
                yield key
            elif key != "classes":
                yield from _keys(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _keys(item)
