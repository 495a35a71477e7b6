"""A second reader of good files, from SPEC.md alone: plain numpy and json, slow, sharing no code with the package."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.slow_ans import ans, classes

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]
SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
MASK = (1 << 64) - 1
FORMATS = Path(__file__).resolve().parents[2] / "formats"
DICTIONARY = (FORMATS / "dictionary.txt").read_bytes().replace(b"\n", b"")


def read(data: bytes) -> Tensors:
    """Returns dtype, shape and little-endian bytes of every tensor by name, aliases included."""
    meta, take = read_opening(data)
    sites = meta.get("sites", [])
    streams = [take(site[4]) for site in sites]
    tables = [read_book(book, take) for book in meta.get("books", [])]
    tensors: Tensors = {}
    scales = []
    for site in sites:
        options = site[5] if len(site) > 5 else {}
        groups = count_groups(site[1], options)
        scales.append([floats(take, options.get(key), groups) for key in ("scale", "offset")])
    for site, stream, (scale, offset) in zip(sites, streams, scales, strict=True):
        tensors |= unstacked(site[0].split(" "), *decode(site, stream, tables[site[2]], scale, offset))
    for dtype, shape, names, *last in meta.get("untouched", []):
        for name in names.split(" "):
            tensors[name] = (dtype, tuple(shape), read_raw(take, dtype, int(np.prod(shape)), last))
    take.finish()
    for alias, name in meta.get("aliases", {}).items():
        tensors[alias] = tensors[name]
    return tensors


def read_opening(data: bytes) -> tuple[dict[str, Any], Parts]:
    """Reads what is before the parts: in version 1 a header with the metadata, in version 2 deflated ones after it."""
    head = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:head])
    text = header["__metadata__"]["timm-compressor"]
    if text != "2":
        meta = json.loads(text)
        assert meta["version"] == 1
        return meta, Parts(data, head, 1)
    assert list(header) == ["__metadata__", "packed-v2"]
    size, deflated = struct.unpack_from("<II", data, head)
    end = head + 8 + deflated
    assert zlib.crc32(data[:end]) == struct.unpack_from("<I", data, end)[0]
    inflated = zlib.decompressobj(-15, zdict=DICTIONARY).decompress(data[head + 8 : end])
    meta = json.loads(inflated)
    assert (len(inflated), meta["version"]) == (size, 2)
    return meta, Parts(data, end + 4, 2)


class Parts:
    """Returns the parts in file order; the checksums of their sections are compared at the end."""

    def __init__(self, data: bytes, start: int, version: int) -> None:
        self.data, self.head, self.at, self.version = data, start, start, version
        self.section = start
        self.sums: list[int] = []
        self.taken = False

    def __call__(self, size: int) -> bytes:
        if self.taken and (self.version == 1 or max(self.at - self.section, size) >= 1 << 16):
            self.close()
        self.taken = True
        part = self.data[self.at : self.at + size]
        self.at += size
        return part

    def close(self) -> None:
        self.sums.append(zlib.crc32(self.data[self.section : self.at]))
        self.section = self.at

    def finish(self) -> None:
        if self.taken:
            self.close()
        last = [zlib.crc32(self.data[: self.head])] if self.version == 1 else []
        assert np.frombuffer(self.data[self.at :], "<u4").tolist() == self.sums + last


def unstacked(names: list[str], dtype: str, shape: tuple[int, ...], data: bytes) -> Tensors:
    """Cuts a stack along axis 0 into the tensors that it has names for."""
    if len(names) == 1:
        return {names[0]: (dtype, shape, data)}
    size = len(data) // len(names)
    return {name: (dtype, shape[1:], data[i * size : i * size + size]) for i, name in enumerate(names)}


def to_floats(data: bytes, dtype: str) -> np.ndarray[Any, Any]:
    if dtype == "BF16":
        return np.frombuffer(b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2)), "<f4")
    return np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)


def from_floats(values: np.ndarray[Any, Any], dtype: str) -> bytes:
    if dtype == "BF16":
        words = values.astype("<f4").view("<u4").reshape(-1).tolist()
        uppers = [(b >> 16) + (b & 0xFFFF > 0x8000 or (b & 0xFFFF == 0x8000 and b >> 16 & 1)) for b in words]
        return struct.pack(f"<{len(uppers)}H", *uppers)
    return values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()


def floats(take: Parts, dtype: str | None, count: int) -> np.ndarray[Any, Any] | None:
    return None if dtype is None else to_floats(take(count * SIZES[dtype]), dtype)


def read_raw(take: Parts, dtype: str, count: int, last: list[Any]) -> bytes:
    if not last:
        return take(count * SIZES.get(dtype, 1))
    if isinstance(last[0], str):
        return from_floats(to_floats(take(count * SIZES[last[0]]), last[0]), dtype)
    if dtype in ("F32", "F16", "BF16"):
        return from_floats(np.array([last[0]], np.float32), dtype) * count
    if dtype == "F64":
        return struct.pack("<d", last[0]) * count
    return int(last[0]).to_bytes(SIZES.get(dtype, 1), "little", signed=last[0] < 0) * count


def read_book(book: list[Any], take: Parts) -> np.ndarray[Any, Any]:
    if book[0] == "grid":
        return np.array([book[1] + k * book[2] for k in range(book[3])]).astype(np.float32).reshape(1, -1, 1)
    if book[0] == "steps":
        step = float(np.float32(book[2]))
        return np.array([book[1] * step + k * step for k in range(book[3])]).astype(np.float32).reshape(1, -1, 1)
    shape = book[1] if isinstance(book[1], list) else [1, book[1], 1]
    values = to_floats(take(int(np.prod(shape)) * SIZES[book[0]]), book[0]).reshape(shape)
    return np.concatenate([values, -values], 1) if "mirrored" in book else values


def count_groups(shape: list[int], options: dict[str, Any]) -> int:
    if "axis" in options:
        return int(shape[options["axis"]])
    return -(-int(np.prod(shape)) // options["block"]) if "block" in options else 1


def decode(site: list[Any], stream: bytes, table: Any, scale: Any, offset: Any) -> tuple[str, tuple[int, ...], bytes]:
    """Computes w = values[book[g], index] * scale[g] + offset[g], entry by entry."""
    name, shape, _, codec, _ = site[:5]
    options = site[5] if len(site) > 5 else {}
    books, codewords, d = table.shape
    entries = np.arange(int(np.prod(shape))).reshape(shape)
    group = np.zeros(entries.size, int)
    if "axis" in options:
        group = np.indices(shape)[options["axis"]].reshape(-1)
    elif "block" in options:
        group = np.arange(entries.size) // options["block"]
    rows = entries.reshape(1, -1) if d == 1 else np.moveaxis(entries, options.get("vector_axis", 0), -1)
    rows = rows.reshape(int(np.prod(rows.shape[:-1])), rows.shape[-1])  # -1 could not be computed for an empty axis
    per_row = -(-rows.shape[1] // d)
    if codec == "classes":
        others = [size for axis, size in enumerate(shape) if axis != options.get("vector_axis", 0)]
        indices = classes(stream, [*others, per_row] if d > 1 and entries.size else shape, codewords)
    else:
        read_stream = {"bits": bits, "huffman": huffman, "ans": ans, "hashed": hashed}[codec]
        indices = read_stream(stream, len(rows) * per_row, codewords, name)
    weights = np.zeros(entries.size, np.float32)
    for r, row in enumerate(rows):
        for place, entry in enumerate(row):
            g = group[entry]
            w = table[g if books > 1 else 0, indices[r * per_row + place // d], place % d]
            w = w * scale[g] if scale is not None else w
            weights[entry] = w + offset[g] if offset is not None else w
    return options.get("dtype", "F32"), tuple(shape), from_floats(weights, options.get("dtype", "F32"))


def bits(stream: bytes, count: int, codewords: int, name: str) -> list[int]:
    width = (codewords - 1).bit_length()
    number = int.from_bytes(stream, "little")
    return [number >> i * width & (1 << width) - 1 for i in range(count)]


def huffman(stream: bytes, count: int, codewords: int, name: str) -> list[int]:
    if not count:
        return []
    table = (codewords + 1) // 2
    lengths = [half for byte in stream[:table] for half in (byte & 15, byte >> 4)][:codewords]
    codes, code, last = {}, 0, 0
    for length, index in sorted((length, index) for index, length in enumerate(lengths) if length):
        code <<= length - last
        codes[length, code] = index
        code, last = code + 1, length
    chunks = -(-count // 65_536)
    sizes = struct.unpack_from(f"<{chunks}I", stream, table)
    at, out = table + 4 * chunks, []
    for chunk, size in enumerate(sizes):
        ones = iter("".join(f"{byte:08b}" for byte in stream[at : at + size]))
        at += size
        for _ in range(min(65_536, count - 65_536 * chunk)):
            length = code = 0
            while (length, code) not in codes:
                length, code = length + 1, code << 1 | (next(ones) == "1")
            out.append(codes[length, code])
    return out


def hashed(stream: bytes, count: int, codewords: int, name: str) -> list[int]:
    def mix(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
        return z ^ z >> 31

    key = 0xCBF29CE484222325
    for byte in name.encode():
        key = (key ^ byte) * 0x100000001B3 & MASK
    key = mix(key ^ int.from_bytes(stream, "little"))
    return [(mix(key + (i + 1) * 0x9E3779B97F4A7C15 & MASK) >> 32) * codewords >> 32 for i in range(count)]
