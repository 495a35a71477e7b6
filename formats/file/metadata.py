"""The metadata of a packed file, checked completely before any tensor is read or allocated (SPEC.md, 2)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compressor.formats.codecs.registry import CODECS
from compressor.formats.content import Grid
from compressor.formats.dtypes import ITEM_SIZES
from compressor.formats.errors import FormatError, UnsupportedError
from compressor.formats.file.codebooks import TableEntry, parse_book
from compressor.formats.file.entries import RawEntry, SiteEntry, parse_raws, parse_site
from compressor.formats.file.fields import parse_name
from compressor.formats.file.objects import OBJECTS, check_object
from compressor.formats.file.opening import VERSION, check_version

__all__ = ["Metadata", "parse_metadata"]

_KEYS = {"version", "requires", "books", "sites", "untouched", "aliases", *OBJECTS}


@dataclass(frozen=True)
class Metadata:
    """The checked metadata of a packed file.

    Args:
        version: of the format.
        books: the codebooks, in file order.
        sites: the shared tensors by name, in file order.
        untouched: the untouched tensors by name, in file order.
        aliases: for each further name of a tied tensor, the name it is stored under.
        fields: the JSON object that all of these were parsed from.
    """

    version: int
    books: tuple[TableEntry | Grid, ...]
    sites: Mapping[str, SiteEntry]
    untouched: Mapping[str, RawEntry]
    aliases: Mapping[str, str]
    fields: Mapping[str, Any]

    @property
    def decoded_size(self) -> int:
        """The size in bytes of all tensors after decoding; tied ones count under each name, as a copy of each would."""
        sizes: dict[str, int] = {}
        entries: list[SiteEntry | RawEntry] = [*self.sites.values(), *self.untouched.values()]
        for entry in entries:
            names = entry.name.split(" ")
            size = math.prod(entry.shape) * ITEM_SIZES[entry.dtype]
            sizes |= dict.fromkeys(names, size // len(names))
        return sum(sizes.values()) + sum(sizes[name] for name in self.aliases.values())


def parse_metadata(fields: Any, max_memory: int) -> Metadata:
    """Checks every field of the metadata and returns it with typed entries.

    Args:
        fields: the parsed JSON.
        max_memory: the most bytes that the decoded tensors may take.

    Raises:
        UnsupportedError: a newer version of the format, or a codec that is not installed.
        FormatError: anything else that SPEC.md does not allow, or tensors larger than ``max_memory``.
    """
    if not isinstance(fields, dict):
        raise FormatError("metadata: expected a JSON object")
    version = _version(fields)
    unknown = sorted({*fields} - _KEYS)
    if unknown:
        raise FormatError(f"metadata: unknown key {unknown[0][:80]!r}, expected {', '.join(sorted(_KEYS))}")
    for key in OBJECTS:
        if key in fields:
            check_object(key, fields[key])
    books = tuple(parse_book(entry, number, version) for number, entry in enumerate(_list(fields, "books")))
    sites = [parse_site(entry, books, version) for entry in _list(fields, "sites")]
    untouched = [raw for entry in _list(fields, "untouched") for raw in parse_raws(entry, version)]
    names = [name for site in sites for name in site.names] + [raw.name for raw in untouched]
    metadata = Metadata(
        version, books, {site.name: site for site in sites}, {raw.name: raw for raw in untouched},
        _aliases(fields, _unique(names)), fields,
    )  # fmt: skip
    _check_whole(metadata, max_memory)
    return metadata


def _version(fields: dict[str, Any]) -> int:
    """Returns the version of the format, after checking it and what it requires of a reader."""
    version = fields.get("version")
    if type(version) is not int or version < 1:
        raise FormatError(f"metadata: version {ascii(version)[:80]}, expected 1 to {VERSION}")
    check_version(version)
    requires = fields.get("requires")
    if not isinstance(requires, list) or not all(isinstance(feature, str) for feature in requires):
        raise FormatError("metadata: 'requires' is not a list of features")
    unknown = [feature for feature in requires if feature not in CODECS]
    if unknown:
        what = f"the file needs the codec {unknown[0][:80]!r}, unknown to this release"
        raise UnsupportedError(f"{what}: upgrade timm-compressor, or install the package that this codec comes from")
    return version


def _check_whole(metadata: Metadata, max_memory: int) -> None:
    """Checks codecs, unused codebooks and decoded size, which depend on several entries."""
    codecs = sorted({site.codec for site in metadata.sites.values()})
    if metadata.fields["requires"] != codecs:
        stated = ascii(metadata.fields["requires"])[:80]
        raise FormatError(f"metadata: 'requires' is {stated}, but the sites use {codecs}")
    unused = {*range(len(metadata.books))} - {site.book for site in metadata.sites.values()}
    if unused:
        raise FormatError(f"metadata: codebook {min(unused)} is used by no tensor")
    size = metadata.decoded_size
    if size > max_memory:
        allowed = f"more than the {max_memory:,} allowed (max_memory)"
        raise FormatError(f"the tensors take {size:,} bytes, {allowed}; if you trust the file: max_memory={size}")


def _unique(names: list[str]) -> set[str]:
    """Returns names as a set; FormatError where one is given twice."""
    found: set[str] = set()
    for name in names:
        if name in found:
            raise FormatError(f"metadata: tensor {name!r} given twice")
        found.add(name)
    return found


def _list(fields: dict[str, Any], key: str) -> list[Any]:
    value = fields.get(key, [])
    if not isinstance(value, list):
        raise FormatError(f"metadata: {key!r} is not a list")
    return value


def _aliases(fields: dict[str, Any], names: set[str]) -> dict[str, str]:
    """Returns the aliases, after checking that each is a new name for one of ``names``."""
    aliases = fields.get("aliases", {})
    if not isinstance(aliases, dict):
        raise FormatError("metadata: 'aliases' is not an object")
    for alias, name in aliases.items():
        if parse_name(alias) in names:
            raise FormatError(f"metadata: tensor {alias!r} given twice")
        if not isinstance(name, str) or name not in names:
            raise FormatError(f"alias {alias!r} stands for {ascii(name)[:80]}, expected a tensor of this file")
    return aliases
