"""Content written as a file of version 1 of the format, to compare with: releases read it, and no longer write it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from compressor.formats.content import Content, Grid, SharedTensor
from compressor.formats.file.container import BLOBS, canonical_json, header_bytes
from compressor.formats.file.layout import layout
from compressor.formats.file.metadata import parse_metadata
from compressor.formats.file.reader import PackedFile
from compressor.formats.file.writer import pack

__all__ = ["pack_version_1"]


def pack_version_1(content: Content, codec: str) -> bytes:
    """Returns the bytes of a file of version 1 with the same weights: no stacks, no tensors of one value, no ``steps``.

    Args:
        content: what the file is to hold.
        codec: the id of the codec of all shared tensors.
    """
    content = replace(content, sites=dict(_without_stacks(content)))
    data = pack(content, codec)
    with PackedFile.from_bytes(data, 1 << 40) as file:
        fields = {**file.metadata, "version": 1}
        parts = layout(parse_metadata(dict(file.metadata), 1 << 40))
        start = file.sizes().header
    for number, book in enumerate(content.books):
        if isinstance(book, Grid):
            fields["books"][number] = ["grid", float(book.start), float(book.step), book.count]
    fields["untouched"] = [_stored(entry) for entry in fields.get("untouched", [])]
    present = {key: value for key, value in fields.items() if value}
    blobs = dict.fromkeys(BLOBS, b"")
    for key, part in layout(parse_metadata(present, 1 << 40)).items():
        known = parts.get(key)
        stored = data[start + known.start :][: known.size] if known else content.untouched[str(key[1])].data
        if len(stored) != part.size:
            raise RuntimeError(f"{part} has {len(stored)} bytes, expected {part.size}")
        blobs[part.blob] += stored
        blobs["checksums"] += np.array([zlib.crc32(stored)], "<u4").tobytes()
    sizes = {blob: len(parts) for blob, parts in blobs.items()}
    header = header_bytes(canonical_json(present), {**sizes, "checksums": sizes["checksums"] + 4})
    return header + b"".join(blobs.values()) + np.array([zlib.crc32(header)], "<u4").tobytes()


def _stored(entry: list[Any]) -> list[Any]:
    """Returns an entry of untouched tensors whose values are stored."""
    return entry[:3] if len(entry) == 4 and not isinstance(entry[3], str) else entry


def _without_stacks(content: Content) -> Iterator[tuple[str, SharedTensor]]:
    """Yields the shared tensors, each slice of a stack for itself."""
    for name, site in content.sites.items():
        names = name.split(" ")
        if len(names) == 1:
            yield name, site
            continue
        if site.block or content.books[site.book].shape[::2] != (1, 1):
            raise ValueError(f"{names[0]} and others: a stack of blocks or of several codebooks")
        for place, (one, indices) in enumerate(zip(names, site.indices.reshape(len(names), -1), strict=True)):
            yield one, replace(_slice(site, place), indices=np.ascontiguousarray(indices))


def _slice(site: SharedTensor, place: int) -> SharedTensor:
    """Returns a slice of a stack along axis 0, with the scales of its groups and the indices of the whole."""
    if site.axis:
        return replace(site, shape=site.shape[1:], axis=site.axis - 1)
    if site.axis is None:
        return replace(site, shape=site.shape[1:])
    scale, offset = (values if values is None else values[place, None] for values in (site.scale, site.offset))
    return replace(site, shape=site.shape[1:], axis=None, scale=scale, offset=offset)
