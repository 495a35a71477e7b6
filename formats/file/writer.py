"""The writer of packed files: codes content to bytes and writes them to disk, verified."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from compressor.formats.codecs.base import Codec, Stream, check_indices
from compressor.formats.codecs.registry import CODECS, codec_class
from compressor.formats.content import Content, RawTensor, SharedTensor, Table, index_shape
from compressor.formats.dtypes import FLOATS, check_byte_order, constant_value, from_storage, to_storage
from compressor.formats.errors import FormatError, IntegrityError, UnsupportedError, UsageError
from compressor.formats.file.choice import Option, choose, encode_each
from compressor.formats.file.codebooks import book_fields, check_book
from compressor.formats.file.container import canonical_json, read_json
from compressor.formats.file.entries import check_raw
from compressor.formats.file.fields import parse_name
from compressor.formats.file.layout import Key, layout, sections
from compressor.formats.file.memory import MAX_MEMORY
from compressor.formats.file.metadata import parse_metadata
from compressor.formats.file.objects import OBJECTS
from compressor.formats.file.opening import VERSION, opening_bytes
from compressor.formats.file.reader import PackedFile
from compressor.formats.io.atomic import check_writable, write_atomically

__all__ = ["pack", "write"]


def write(path: str | os.PathLike[str], content: Content, codec: str = "auto", force: bool = False) -> int:
    """Writes a packed file: to a temporary file, which is read back, compared with ``content`` and then renamed.

    Args:
        path: the file to write.
        content: what it is to hold.
        codec: the id of the codec of all sites that name none; "auto", the default, chooses codecs such that the whole
            file is smallest.
        force: whether an existing file is replaced; by default it is an error.

    Returns:
        The number of bytes written.

    Raises:
        UsageError: the file exists and ``force`` is not set, or the content cannot be packed.
        ResourceError: the folder does not exist, or disk space or permissions do not suffice.
        IntegrityError: the file read back differs from ``content``.
    """
    check_writable(path, force)
    data = pack(content, codec)
    write_atomically(path, data, verify=lambda temporary: _verify(temporary, content), force=force)
    return len(data)


def pack(content: Content, codec: str = "auto") -> bytes:
    """Returns the bytes of a packed file; the same content gives the same bytes on every machine.

    Args:
        content: what the file is to hold.
        codec: as for ``write``.

    Raises:
        UsageError: a tensor or codebook cannot be packed; the message names it and the reason.
        UnsupportedError: the machine is big-endian.
    """
    check_byte_order()
    try:
        return _pack(content, codec)
    except (FormatError, UnsupportedError) as error:
        raise UsageError(f"cannot be packed: {error}") from error


def _pack(content: Content, codec: str) -> bytes:
    candidates = [name for name in sorted(CODECS.built_in()) if CODECS[name].general] if codec == "auto" else [codec]
    options = {name: _options(name, site, content, candidates) for name, site in content.sites.items()}
    chosen = choose(options)
    parts = _codebook_parts(content, {name: option.codec for name, option in chosen.items()})
    parts.update({("indices", name): option.data for name, option in chosen.items()})
    for name, raw in content.untouched.items():
        parts["untouched", parse_name(name)] = _raw_bytes(name, raw)
    text = _metadata_text(_metadata(content, chosen))
    order = layout(parse_metadata(read_json(text, "metadata"), MAX_MEMORY))
    for key, part in order.items():
        if len(parts[key]) != part.size:
            raise FormatError(f"{part} has {len(parts[key]):,} bytes, expected {part.size:,}")
    body = b"".join(parts[key] for key in order)
    checksums = [zlib.crc32(body[one.start : one.start + one.size]) for one in sections(order)]
    data = body + np.array(checksums, "<u4").tobytes()
    return opening_bytes(text, len(data)) + data


def _metadata_text(fields: dict[str, Any]) -> str:
    try:
        return canonical_json(fields)
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"model, preprocessing, recipe or provenance is not JSON ({error})") from error


def _options(name: str, site: SharedTensor, content: Content, candidates: list[str]) -> list[Option]:
    """Returns the ways to store the indices of a site, by its codec or else by the candidates."""
    if not 0 <= site.book < len(content.books):
        raise FormatError(f"codebook of {name!r} is {site.book}, expected less than {len(content.books)}")
    _, codewords, length = content.books[site.book].shape
    if length > 1 and not 0 <= site.vector_axis < len(site.shape):
        raise FormatError(
            f"vector_axis of {name!r} is {site.vector_axis}, expected an axis of shape {list(site.shape)}"
        )
    shape = index_shape(site.shape, length, site.vector_axis)
    count = math.prod(shape)
    if site.indices.shape != (count,) or site.indices.dtype.kind != "u":
        got = f"{site.indices.dtype}{list(site.indices.shape)}"
        raise FormatError(f"indices of {name!r} are {got}, expected unsigned [{count}] for shape {list(site.shape)}")
    stream = Stream(name, count, codewords, shape)
    check_indices(site.indices, stream)
    codecs: list[Codec] = [site.codec] if site.codec else [codec_class(candidate)() for candidate in candidates]
    suitable = [codec for codec in codecs if codewords <= codec.max_codewords]
    if not suitable:
        most = max(codec.max_codewords for codec in codecs)
        raise FormatError(f"{name!r} has {codewords} codewords, expected at most {most} with codec {codecs[0].id!r}")
    return encode_each(suitable, site.indices, stream)


def _codebook_parts(content: Content, codecs: Mapping[str, str]) -> dict[Key, bytes]:
    """Returns the stored bytes of codebooks, scales and offsets, after checking that storing changes no value."""
    parts: dict[Key, bytes] = {}
    ascending = {site.book for name, site in content.sites.items() if CODECS[codecs[name]].general}
    for number, book in enumerate(content.books):
        check_book(book, f"codebook {number}", number in ascending)
        if isinstance(book, Table):
            parts["codebook", number] = _exact_bytes(book.values, book.dtype, f"codebook {number}")
    for name, site in content.sites.items():
        for kind, values in (("scale", site.scale), ("offset", site.offset)):
            if values is not None:
                parts[kind, name] = _exact_bytes(values, site.scale_dtype, f"{kind} of {name!r}")
    return parts


def _exact_bytes(values: Any, dtype: str, what: str) -> bytes:
    """Returns float32 values as bytes of ``dtype``; FormatError where they are not finite or not exact in it."""
    if dtype not in FLOATS:
        raise FormatError(f"{what} is to be stored as {dtype!r}, expected {', '.join(FLOATS)}")
    with np.errstate(over="ignore"):
        data = to_storage(values, dtype)
    if not np.isfinite(values).all():
        raise FormatError(f"{what} is not finite")
    if not np.array_equal(from_storage(data, dtype), np.ravel(values)):
        raise FormatError(f"{what} does not fit {dtype} exactly: round it with dtypes.round_to first")
    return data


def _raw_bytes(name: str, raw: RawTensor) -> bytes:
    """Returns the stored bytes of an untouched tensor; FormatError where its stored dtype changes a value."""
    if raw.stored in ("", raw.dtype):
        check_raw(raw.data, raw.dtype, f"untouched {name!r}")
        return raw.data
    if raw.dtype not in FLOATS:
        raise FormatError(f"untouched {name!r} is {raw.dtype} stored as {raw.stored}, expected stored as {raw.dtype}")
    return _exact_bytes(from_storage(raw.data, raw.dtype), raw.stored, f"untouched {name!r}")


def _metadata(content: Content, chosen: Mapping[str, Option]) -> dict[str, Any]:
    """Returns the fields of the metadata; empty ones are omitted."""
    entries: dict[str, Any] = {
        "books": [book_fields(book) for book in content.books],
        "sites": [
            _site_fields(name, site, chosen[name].codec, len(chosen[name].data)) for name, site in content.sites.items()
        ],
        "untouched": _untouched_fields(content.untouched),
        "aliases": dict(content.aliases),
        **{key: getattr(content, key) for key in OBJECTS},
    }
    present = {key: value for key, value in entries.items() if value}
    return {"version": VERSION, "requires": sorted({option.codec for option in chosen.values()}), **present}


def _site_fields(name: str, site: SharedTensor, codec: str, size: int) -> list[Any]:
    """Returns the metadata entry of a site, without options that have their default."""
    options = {
        "dtype": site.dtype if site.dtype != "F32" else None,
        "axis": site.axis,
        "block": site.block,
        "vector_axis": site.vector_axis or None,
        "scale": site.scale_dtype if site.scale is not None else None,
        "offset": site.scale_dtype if site.offset is not None else None,
    }
    present = {key: value for key, value in options.items() if value is not None}
    return [name, list(site.shape), site.book, codec, size, *([present] if present else [])]


def _untouched_fields(untouched: Mapping[str, RawTensor]) -> list[list[Any]]:
    """Returns the metadata entries of untouched tensors: one for each dtype, shape, and stored dtype or value."""
    groups: dict[str, tuple[list[Any], list[str]]] = {}
    for name, raw in untouched.items():
        value = constant_value(raw.data, raw.dtype)
        if value is not None and len(json.dumps(value)) <= len(raw.data):
            last: list[Any] = [value]
        else:
            last = [raw.stored] if raw.stored not in ("", raw.dtype) else []
        entry = [raw.dtype, list(raw.shape), "", *last]
        groups.setdefault(json.dumps(entry), (entry, []))[1].append(name)
    return [[*entry[:2], " ".join(names), *entry[3:]] for entry, names in groups.values()]


def _verify(path: Path, content: Content) -> None:
    """Raises IntegrityError unless the file holds exactly ``content``."""
    with PackedFile.open(path, MAX_MEMORY) as file:  # which the writer made itself
        for name, site in content.sites.items():
            scaled = site.scale is not None or site.offset is not None
            _check_same(file.shared(name), site if scaled else replace(site, scale_dtype="F32"), f"tensor {name!r}")
        for number, book in enumerate(content.books):
            _check_same(file.book(number), book, f"codebook {number}")
        for name, raw in content.untouched.items():
            plain = raw.stored == raw.dtype or file.untouched[name].value is not None
            _check_same(file.raw(name), replace(raw, stored="") if plain else raw, f"tensor {name!r}")
        for key in ("aliases", *OBJECTS):
            if canonical_json(getattr(file, key) or {}) != canonical_json(getattr(content, key) or {}):
                raise IntegrityError(f"{key} read back differently from what was written: please report this")


def _check_same(read: Any, written: Any, what: str) -> None:
    """Compares two dataclass instances field by field, except ``codec``, which the writer may have chosen."""
    for field in fields(written):
        after, before = getattr(read, field.name), getattr(written, field.name)
        if isinstance(after, np.ndarray) and before is not None:
            equal = np.array_equal(after, before)
        else:
            equal = after is before or after == before
        if field.name != "codec" and not equal:
            raise IntegrityError(
                f"{field.name} of {what} read back differently from what was written: please report this"
            )
