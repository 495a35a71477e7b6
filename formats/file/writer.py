"""Write a packed file: content to bytes, and bytes to disk, verified."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from compressor.formats.codecs.base import Codec, Stream, check_indices
from compressor.formats.codecs.registry import CODECS, codec_class
from compressor.formats.content import Content, Indices, RawTensor, SharedTensor, Table, index_count
from compressor.formats.dtypes import FLOATS, check_byte_order, from_storage, to_storage
from compressor.formats.errors import FormatError, IntegrityError, UnsupportedError, UsageError
from compressor.formats.file.codebooks import book_fields, check_book
from compressor.formats.file.container import canonical_json, header_bytes, read_json
from compressor.formats.file.entries import check_raw
from compressor.formats.file.fields import parse_name
from compressor.formats.file.layout import Key, blob_sizes, layout
from compressor.formats.file.metadata import OBJECTS, VERSION, parse_metadata
from compressor.formats.file.reader import MAX_MEMORY, PackedFile
from compressor.formats.io.atomic import check_writable, write_atomically

__all__ = ["pack", "write"]


def write(path: str | os.PathLike[str], content: Content, codec: str = "auto", force: bool = False) -> int:
    """Write a packed file, reopen it, compare all it says with ``content``, and only then put it in place.

    Args:
        path: a new file; an existing one is replaced only with ``force``.
        content: what to write.
        codec: a codec's id, or ``auto``: for each site the one that gives the fewest bytes.
        force: replace an existing file.

    Returns:
        The bytes written.

    Raises:
        UsageError: the file exists, or the content cannot be written.
        ResourceError: folder, disk or permissions do not allow it.
    """
    check_writable(path, force)
    data = pack(content, codec)
    write_atomically(path, data, verify=lambda temporary: _verify(temporary, content), force=force)
    return len(data)


def pack(content: Content, codec: str = "auto") -> bytes:
    """Give the bytes of a packed file; the same content gives the same bytes on any machine.

    Raises:
        UsageError: naming the tensor or codebook that cannot be written, and why.
        UnsupportedError: on a big-endian machine.
    """
    check_byte_order()
    try:
        return _pack(content, codec)
    except (FormatError, UnsupportedError) as error:
        raise UsageError(f"cannot be packed: {error}") from error


def _pack(content: Content, codec: str) -> bytes:
    candidates = [name for name in sorted(CODECS.built_in()) if CODECS[name].general] if codec == "auto" else [codec]
    parts: dict[Key, bytes] = {}
    codecs: dict[str, str] = {}
    for name, site in content.sites.items():
        codecs[name], parts["indices", name] = _encode(name, site, content, candidates)
    parts.update(_codebook_parts(content, codecs))
    for name, raw in content.untouched.items():
        parts["untouched", parse_name(name)] = _stored(name, raw)
    text = _text(_metadata(content, codecs, parts))
    order = layout(parse_metadata(read_json(text, "metadata"), MAX_MEMORY))
    for key, part in order.items():
        if len(parts[key]) != part.size:
            raise FormatError(f"{part} has {len(parts[key]):,} bytes, expected {part.size:,}")
    header = header_bytes(text, blob_sizes(order))
    checksums = [zlib.crc32(parts[key]) for key in order] + [zlib.crc32(header)]
    return b"".join([header, *(parts[key] for key in order), np.array(checksums, "<u4").tobytes()])


def _text(fields: dict[str, Any]) -> str:
    try:
        return canonical_json(fields)
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"model, preprocessing, recipe or provenance is not JSON ({error})") from error


def _encode(name: str, site: SharedTensor, content: Content, candidates: list[str]) -> tuple[str, bytes]:
    """Code the indices with the codec the site asks for, or the best candidate; ties to the first."""
    if not 0 <= site.book < len(content.books):
        raise FormatError(f"codebook of {name!r} is {site.book}, expected less than {len(content.books)}")
    _, codewords, length = content.books[site.book].shape
    if length > 1 and not 0 <= site.vector_axis < len(site.shape):
        raise FormatError(
            f"vector_axis of {name!r} is {site.vector_axis}, expected an axis of shape {list(site.shape)}"
        )
    count = index_count(site.shape, length, site.vector_axis)
    if site.indices.shape != (count,) or site.indices.dtype.kind != "u":
        got = f"{site.indices.dtype}{list(site.indices.shape)}"
        raise FormatError(f"indices of {name!r} are {got}, expected unsigned [{count}] for shape {list(site.shape)}")
    stream = Stream(name, count, codewords)
    check_indices(site.indices, stream)
    codecs: list[Codec] = [site.codec] if site.codec else [codec_class(candidate)() for candidate in candidates]
    able = [codec for codec in codecs if codewords <= codec.max_codewords]
    if not able:
        most = max(codec.max_codewords for codec in codecs)
        raise FormatError(f"{name!r} has {codewords} codewords, expected at most {most} with codec {codecs[0].id!r}")
    return _smallest(able, site.indices, stream)


def _smallest(codecs: list[Codec], indices: Indices, stream: Stream) -> tuple[str, bytes]:
    """Code with every codec that its code lengths do not rule out; give the shortest, ties to the first id."""
    if len(codecs) == 1:
        return codecs[0].id, codecs[0].encode(indices, stream)
    histogram = np.bincount(indices, minlength=stream.codewords)
    least = {codec.id: float((codec.code_lengths(histogram) * histogram).sum()) / 8 - 1 for codec in codecs}
    best: tuple[int, str, bytes] | None = None
    for codec in sorted(codecs, key=lambda codec: least[codec.id]):
        if best is None or least[codec.id] <= best[0]:
            data = codec.encode(indices, stream)
            best = min(best or (len(data), codec.id, data), (len(data), codec.id, data))
    assert best is not None
    return best[1:]


def _codebook_parts(content: Content, codecs: Mapping[str, str]) -> dict[Key, bytes]:
    """Give codebooks, scales and offsets as stored, after checking that storing changes no value."""
    parts: dict[Key, bytes] = {}
    ascending = {site.book for name, site in content.sites.items() if CODECS[codecs[name]].general}
    for number, book in enumerate(content.books):
        check_book(book, f"codebook {number}", number in ascending)
        if isinstance(book, Table):
            parts["codebook", number] = _exact(book.values, book.dtype, f"codebook {number}")
    for name, site in content.sites.items():
        for kind, values in (("scale", site.scale), ("offset", site.offset)):
            if values is not None:
                parts[kind, name] = _exact(values, site.scale_dtype, f"{kind} of {name!r}")
    return parts


def _exact(values: Any, dtype: str, what: str) -> bytes:
    """Store finite float32 values; raises FormatError where ``dtype`` does not hold them exactly."""
    if dtype not in FLOATS:
        raise FormatError(f"{what} is to be stored as {dtype!r}, expected {', '.join(FLOATS)}")
    with np.errstate(over="ignore"):
        data = to_storage(values, dtype)
    if not np.isfinite(values).all():
        raise FormatError(f"{what} is not finite")
    if not np.array_equal(from_storage(data, dtype), np.ravel(values)):
        raise FormatError(f"{what} does not fit {dtype} exactly: round it with dtypes.round_to first")
    return data


def _stored(name: str, raw: RawTensor) -> bytes:
    if raw.stored in ("", raw.dtype):
        check_raw(raw.data, raw.dtype, f"untouched {name!r}")
        return raw.data
    if raw.dtype not in FLOATS:
        raise FormatError(f"untouched {name!r} is {raw.dtype}, expected it stored as it is")
    return _exact(from_storage(raw.data, raw.dtype), raw.stored, f"untouched {name!r}")


def _metadata(content: Content, codecs: Mapping[str, str], parts: Mapping[Key, bytes]) -> dict[str, Any]:
    """Give the metadata; what is empty is left out."""
    entries: dict[str, Any] = {
        "books": [book_fields(book) for book in content.books],
        "sites": [
            _site_fields(name, site, codecs[name], len(parts["indices", name])) for name, site in content.sites.items()
        ],
        "untouched": _untouched_fields(content.untouched),
        "aliases": dict(content.aliases),
        **{key: getattr(content, key) for key in OBJECTS},
    }
    kept = {key: value for key, value in entries.items() if value}
    return {"version": VERSION, "requires": sorted({*codecs.values()}), **kept}


def _site_fields(name: str, site: SharedTensor, codec: str, size: int) -> list[Any]:
    options = {
        "dtype": site.dtype if site.dtype != "F32" else None,
        "axis": site.axis,
        "block": site.block,
        "vector_axis": site.vector_axis or None,
        "scale": site.scale_dtype if site.scale is not None else None,
        "offset": site.scale_dtype if site.offset is not None else None,
    }
    kept = {key: value for key, value in options.items() if value is not None}
    return [name, list(site.shape), site.book, codec, size, *([kept] if kept else [])]


def _untouched_fields(untouched: Mapping[str, RawTensor]) -> list[list[Any]]:
    """Group the names by dtype, shape and stored dtype, groups in order of first appearance."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, raw in untouched.items():
        groups.setdefault((raw.dtype, raw.shape, raw.stored or raw.dtype), []).append(name)
    return [
        [dtype, list(shape), " ".join(names), *([stored] if stored != dtype else [])]
        for (dtype, shape, stored), names in groups.items()
    ]


def _verify(path: Path, content: Content) -> None:
    """Raise IntegrityError unless the file says exactly what ``content`` says."""
    with PackedFile.open(path) as file:
        for name, site in content.sites.items():
            scaled = site.scale is not None or site.offset is not None
            _same(file.shared(name), site if scaled else replace(site, scale_dtype="F32"), f"tensor {name!r}")
        for number, book in enumerate(content.books):
            _same(file.book(number), book, f"codebook {number}")
        for name, raw in content.untouched.items():
            _same(file.raw(name), replace(raw, stored="") if raw.stored == raw.dtype else raw, f"tensor {name!r}")
        for key in ("aliases", *OBJECTS):
            if canonical_json(getattr(file, key) or {}) != canonical_json(getattr(content, key) or {}):
                raise IntegrityError(f"{key} read back differently from what was written: please report this")


def _same(read: Any, given: Any, what: str) -> None:
    """Compare two records field by field; which codec coded a site is the file's own affair."""
    for field in fields(given):
        one, two = getattr(read, field.name), getattr(given, field.name)
        equal = (
            np.array_equal(one, two) if isinstance(one, np.ndarray) and two is not None else one is two or one == two
        )
        if field.name != "codec" and not equal:
            raise IntegrityError(
                f"{field.name} of {what} read back differently from what was written: please report this"
            )
