"""Reads a packed file of timm-compressor: this one file, Python and numpy are all it needs.

    arrays = packed_reader.read("model.safetensors")         # a numpy array for each tensor, by name
    model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    python packed_reader.py model.safetensors model.npz      # from the shell, as a file of numpy.load

bfloat16, which numpy has not, comes as float32 of the same values; 8-bit floats come as bytes. Checksums are checked,
and nothing in the file is executed. The format is specified in SPEC.md of timm-compressor.
"""

import base64
import json
import math
import sys
import zlib
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import numpy as np

KINDS = {"F64": "<f8", "I64": "<i8", "U64": "<u8", "F32": "<f4", "I32": "<i4", "U32": "<u4", "F16": "<f2", "U8": "u1",
         "BF16": "<u2", "I16": "<i2", "U16": "<u2", "I8": "i1", "BOOL": "?"}  # fmt: skip
EIGHTHS = [65536, 60097, 55109, 50535, 46341, 42495, 38968, 35734]
DICTIONARY = zlib.decompress(base64.b85decode("c-oa%+mfR;5dD=YDi6tqaUluc<}nYc$~R0+C>dm%3<y?$XE%xeJ>4xX65vTvJ9tfBkGfl"
    "}mYY^yRI`aTS@oeCS=NPumk*U+uI*E^!epCME}MY`Z$*{9qs&E?r5xydptDU{>06S0%xsE5fNykV%E72AUGMPLySplxS;3x3gmY@SXC>Rt5Ykb5q-9"
    "Dsikva~y^!CPVPuUhq+26(lec-LE%HHtl+eMrUfH&KW58OQ-&9gpRx3e3Nh?o<dLoIUy5w!rq!I{i^{#YM=HHYd_fMdXnosZ~sywOeDJ?)7#h$XfY5"
    "T9E&!S;{oX7AM4fjbsvag97t{LzBW&`JwYg7F(qnAYuQD&=DKBIa8ol%#Pd{xr7$yRML*QUG3sgP>frdJzLXI1BPJton-MjcM0EYqm0OVw;06I*?&r"
    "OsyHp;+`1JOJ18#dDGs3o0WEu2qg(OZ#CGy|zn>dz$IA&h;fJl^pA6OFTaEZqhu_Dri%Yl~;D;;Vym)gJtDdkU{vm-yK4D7D5#9QA$L6J{KFx$}@$6"
    "OCdf91%z*WWf38K4bnn3O@7W{S2@fm3K>5{D6lApQEV57EMz<QBSRPjYCDr1;DsU-$etHW{V~bK5t#|ux?tg0jN_2UGf}=M!U5bi+&Xe%S&~zDoYc?"
    "ia*~<yJkSDJK*m)Qy!;gurN?^-$|_R@a-_MCM6Q$c3N12tVPT-VGNIt3HjC~+k)<NFQ(h>o+M7t4QWix5`3NSyI-m12SGom}<m7S?pH|<X^X2-xL%%"
    "^2Jps&wa>;fH=P|NJT;(Nc@;^aT@X$di7APYJXRDycLfZ!zjxS5t60CUu=2Gl{QmLux1Vw?~eC=d&4SHgoLKvgXVZZeWM+8}SZ4dfYgs>od-jLBMQ&"
    ")JhR2nQoEOV`-0h_puK|0!O!~OyJrp;!wyCWGNkQQ%u_!;dSdCrd^e#Z3aYw?3CDYgQ+wNbErQU$wBUoa@{x>JR)XX`$0XX}K`#Nlssm1zf0fNrXr("
    "o(020$<j_OKUm>mZ4NnrdPn6<0uila9CT=RGmpFr$*-bsi}*ca+=9jqOi8PkH-9+AxmKBxzupbf>*0yYXV+xaNJv9p5QZc3MI?oY;PRh8vx8KzAz}%"
    "xwREjO9Kk9Tr5Dw_FJ(B9HuJ}{c9Bdr+=6Zr63=m+I-apgSpXNQ2?Wb>Qv|qQ<UXti*n#Wwg8i<=V%WoS|!sfWC(EM7z7C0s%EHU-)&XaGJPj6o8x_"
    "q0&TH2FH2Cyb4@VRhWF>RD#2ybRA@KCLyzp5^a}5AfW;g3bJ{Tho9S+s47mRaO5DY?iC%vH5%)a%d-H`l@0Y*bZvEw_A27Ut+XkF~-W|$2R&0YLqtd"
    "*lilGsc+?>diEj>64pn|#<#xGnQL=h*fyeRMu%2d@=dbNG+Vq})cH0?@yrP(jZR4Tv2J8Bk&OhggrfxWKoEmF4t=yH%IYE@%x$V`?WffIuh*3L@|pg"
    "`-RGMRn5m<sI$Fi&ERa!r*5HlW-KYyo}fzPN!Ypgm}+;_BS?ZW|~&FhVGf`{_M7eeah%QWWIbqGb;CY^ri*3#Qc%EFs|$A>hV(y}wyd8MSg~6S#z?t"
    "g7}(ErX0fnrmff;D*hM6now{LA$>_$mke7Cunf+{;#Mx+v3v@0tkQsiK?o1+^Da?uWT3ev%;@}<6$0R^NHV(axr-pgwI$Y7+qjYR9rVQXpVq7uc2!^"
    "Lnow&+bL$C9)JkL!QQ3Cq<nNq9OLt~%MJAqTTEeag<b{0hcDgvTtY8@^Tlwlgro2zgJH8vq|NBfAR^p{fF_z0LTd;5DI)6cQ+9yyRY@Dx%p6^|(BZ2"
    "(y!RqJFYFU9!to*&I_qBI-pkhU!k25o<}s*j9XH#B68DwxA+4RGwfD4EZr+ne8WZ<D$b$!xt$`f<9UOm$h1MgK$0@awE3u3RR{f~N+|po6J?`t_WA("
    "hU;GW)kPzJXY6*g1|6CPN$26l4lRtXaey@z0jN?~rP#LLiZ0oSDE77N=h^ti8wkJWR_h3!4P_0SA%ZD@vyVFwQ^TLU{eb!&zl7J3iC9*354bnBCol5"
    "p>2IO0a}VYvL9Q|~sn#TwvlF~vCbIG5<LZ8(?Zag#4;+_`|`P1N>e5lwp@y1V?AH+HDP-)P_<z$SmEJJ)dccHAy0+@r9C3>#%IZq)1r8v-UCK!C&L?"
    "lp;d5P0u<PV;`L^O<bLi2Gv%!GqoPh9kP0gU=!MKf+N8AzPhptIkdUaGLx=CuV<ez6QVTV)(DmDc;LyKvPWuLpzS0ex(0JfPW^y{>=jW+`=N3E0RGN"
    "O_PBAu>^d2zqokodBowX9QII$Ep%wWaHbMWqF+1iZ#`ZCtunlouSl>*Hrd=}fRoFFj5grZ<>v({7JE!QjGcJ2GO@BXgtJv)e8F;@KvCbB`m5VBys#d"
    "f!7n~c-vxI<?+%B!AI9xroxV9YOMd?cbwY2I"))  # fmt: skip


def read(path: str) -> dict[str, Any]:
    """Returns an array for each tensor of a file, by its name in the state dict; ValueError where it is damaged."""
    meta, take = opened(np.fromfile(path, "u1").tobytes())
    sites = [(*site, {})[:6] for site in meta.get("sites", [])]
    raws = [(name, raw) for raw in meta.get("untouched", []) for name in raw[2].split(" ")]
    entries = sum(math.prod(shape) for _, shape, *_ in (*sites, *(raw for _, raw in raws)))
    check(8 * entries <= max(1 << 29, 2000 * len(take.data)), "it asks for too much memory")
    streams = [take(site[4]) for site in sites]
    books = [read_book(book, take) for book in meta.get("books", [])]
    affine, tensors = list[Any](), dict[str, Any]()
    for _, shape, _, _, _, o in sites:
        groups = shape[o["axis"]] if "axis" in o else -(-math.prod(shape) // o["block"]) if "block" in o else 1
        affine.append([read_values(take, o[key], groups, "F32") if key in o else None for key in ("scale", "offset")])
    for name, (kind, shape, _, *last) in raws:
        if last and not isinstance(last[0], str):
            tensors[name] = np.full(shape, last[0], "f4" if kind == "BF16" else KINDS[kind])
        else:
            tensors[name] = read_values(take, last[0] if last else kind, math.prod(shape), kind).reshape(shape)
    take.check_sums()
    for site, stream, (scale, offset) in zip(sites, streams, affine, strict=True):
        names, weights = site[0].split(" "), decode(site, stream, books[site[2]], scale, offset)
        tensors |= zip(names, weights if len(names) > 1 else [weights], strict=True)
    return {**tensors, **{alias: tensors[name] for alias, name in meta.get("aliases", {}).items()}}


def check(holds: object, what: str) -> None:
    """Raises ValueError unless something holds."""
    if not holds:
        raise ValueError(f"this is no whole packed file: {what}")


class Parts:
    """Returns the parts of a file one after the other; sections of them have checksums, which are compared last."""

    def __init__(self, data: bytes, start: int, version: int) -> None:
        self.data, self.at, self.start, self.version, self.cuts = memoryview(data), start, start, version, list[int]()

    def __call__(self, size: int) -> memoryview:  # noqa: D102
        if not self.cuts or self.version == 1 or max(self.at - self.cuts[-1], size) >= 1 << 16:
            self.cuts.append(self.at)
        check(0 <= size <= len(self.data) - self.at, "it ends early")
        self.at += size
        return self.data[self.at - size : self.at]

    def check_sums(self) -> None:  # noqa: D102
        spans = [slice(a, b) for a, b in zip(self.cuts, [*self.cuts[1:], self.at], strict=False)]
        spans += [slice(self.start)] if self.version == 1 else []
        sums = b"".join(zlib.crc32(self.data[span]).to_bytes(4, "little") for span in spans)
        check(sums == self.data[self.at :], "checksums differ")


def opened(data: bytes) -> tuple[dict[str, Any], Parts]:
    """Returns the metadata, and what reads the parts after them."""
    head = 8 + int.from_bytes(data[:8], "little")
    check(8 < head <= len(data) - 8, "it ends in its header")
    text, start, version = json.loads(data[8:head]).get("__metadata__", {}).get("timm-compressor", ""), head, 1
    if text[:1] != "{":
        check(text == "2", f"format {text[:9]!r}, which this reader does not know")
        size, deflated = np.frombuffer(data[head : head + 8], "<u4").tolist()
        start, version = head + 12 + deflated, 2
        check(zlib.crc32(data[: start - 4]).to_bytes(4, "little") == data[start - 4 : start], "checksum of metadata")
        text = zlib.decompressobj(-15, zdict=DICTIONARY).decompress(data[head + 8 : start - 4], min(size, 1 << 24))
    return json.loads(text), Parts(data, start, version)


def rounded(values: Any, kind: str) -> Any:
    """Returns values rounded to a float dtype, ties to even; BF16 as float32."""
    if kind != "BF16":
        return values.astype(KINDS[kind])
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return np.where(np.isnan(values), np.float32("nan"), (bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000).view("f4"))


def read_values(take: Parts, stored: str, count: int, kind: str) -> Any:
    """Returns so many values, which are stored as one dtype, as another."""
    dtype = np.dtype(KINDS.get(stored, "u1"))
    values = np.frombuffer(take(count * dtype.itemsize), dtype).copy()
    values = (values.astype(np.uint32) << 16).view(np.float32) if stored == "BF16" else values
    return values if stored == kind else rounded(values, kind)


def read_book(book: list[Any], take: Parts) -> Any:
    """Returns the codewords, float32[B, K, d]."""
    if book[0] in ("grid", "steps"):
        start, step = book[1:3] if book[0] == "grid" else (book[1] * (step := float(np.float32(book[2]))), step)
        return (start + np.arange(book[3]) * np.float64(step)).astype(np.float32).reshape(1, -1, 1)
    shape = book[1] if isinstance(book[1], list) else [1, book[1], 1]
    values = read_values(take, book[0], math.prod(shape), "F32").reshape(shape)
    return np.concatenate([values, -values], 1) if "mirrored" in book[2:] else values


def spread(values: Any, shape: list[int], o: dict[str, Any]) -> Any:
    """Returns one value a group in a shape that broadcasts over the tensor."""
    sizes = [-1 if axis == o.get("axis") else 1 for axis in range(len(shape))]
    return np.repeat(values, o["block"])[: math.prod(shape)].reshape(shape) if "block" in o else values.reshape(sizes)


def decode(site: Any, stream: memoryview, table: Any, scale: Any, offset: Any) -> Any:
    """Returns values[book[g], index] * scale[g] + offset[g], in float32, then rounded to the dtype of the site."""
    name, shape, _, codec, _, options = site
    (books, codewords, d), axis = table.shape, options.get("vector_axis", 0)
    axes = [*shape[:axis], *shape[axis + 1 :], -(-shape[axis] // d)] if d > 1 else shape
    check(codec in CODECS, f"codec {codec!r}, which this reader does not know")
    indices = np.asarray(CODECS[codec](stream, axes, codewords, name) if math.prod(axes) else [], "i8").reshape(axes)
    check(not indices.size or indices.max() < codewords, f"an index of {name}")
    if books > 1:  # with vectors, all entries of a row are in one group
        start = np.broadcast_to(spread(np.arange(books) * codewords, shape, options), shape)
        indices = indices + (np.moveaxis(start, axis, -1)[..., :1] if d > 1 else start)
    weights = table.reshape(-1, d)[indices].reshape([*axes[:-1], axes[-1] * d] if d > 1 else shape)
    weights = np.moveaxis(weights[..., : shape[axis]], -1, axis) if d > 1 else weights
    with np.errstate(over="ignore", under="ignore"):
        weights = weights if scale is None else weights * spread(scale, shape, options)
        weights = weights if offset is None else weights + spread(offset, shape, options)
        return rounded(np.ascontiguousarray(weights), options.get("dtype", "F32"))


def bits(stream: memoryview, axes: list[int], codewords: int, name: str) -> Any:
    """Returns indices of a fixed length, the lowest bit first."""
    count, width = math.prod(axes), (codewords - 1).bit_length()
    check(len(stream) == -(-count * width // 8), f"bytes of {name}")
    flat = np.unpackbits(np.frombuffer(stream, np.uint8), count=count * width, bitorder="little")
    weights = np.arange(width, dtype=np.int64)
    return (flat.reshape(count, width).astype(np.int64) << weights).sum(1)


def huffman(stream: memoryview, axes: list[int], codewords: int, name: str) -> Any:
    """Returns indices of a canonical code: what begins at each bit is looked up at once, then followed."""
    count, at, found = math.prod(axes), (codewords + 1) // 2, []
    lengths = [half for byte in stream[:at] for half in (byte & 15, byte >> 4)][:codewords]
    used, longest = sorted((n, index) for index, n in enumerate(lengths) if n), max(lengths)
    widths = [1 << longest - n for n, _ in used]
    check(sum(widths) == 1 << longest or len(used) == 1, f"codes of {name}")
    length_of, index_of = np.repeat([*used, (0, 0)], [*widths, (1 << longest) - sum(widths)], axis=0).T
    sizes = np.frombuffer(stream[at : at + 4 * -(-count >> 16)], "<u4").tolist()
    at += 4 * len(sizes)
    for begin, size in zip(range(0, count, 1 << 16), sizes, strict=True):
        flat = np.pad(np.unpackbits(np.frombuffer(stream[at : at + size], np.uint8)).astype(np.int64), (0, longest))
        coming: Any = sum(flat[bit : len(flat) - longest + bit] << longest - 1 - bit for bit in range(longest))
        to, at = (np.arange(len(coming)) + length_of[coming]).tolist(), at + size
        places = list(accumulate(range(1, min(1 << 16, count - begin)), lambda p, _: to[p], initial=0))  # noqa: B023
        found.append(index_of[coming[places]])
    return np.concatenate(found)


def ans(stream: memoryview, axes: list[int], codewords: int, name: str) -> list[int]:
    """Returns indices of range asymmetric numeral systems with one table."""
    count, at = math.prod(axes), 1 + (codewords + 1) // 2
    lengths = [half for byte in stream[1:at] for half in (byte & 15, byte >> 4)][:codewords]
    below = [max(0, n - 1) for n in lengths]
    end = at - (-sum(below) // 8)
    low, sizes = int.from_bytes(stream[at:end], "little"), np.frombuffer(stream[end : end + 4 * -(-count >> 20)], "<u4")
    shifts = accumulate(below, initial=0)
    table = [(1 << b | low >> s & (1 << b) - 1) if n else 0 for n, b, s in zip(lengths, below, shifts, strict=False)]
    layout = end + 4 * len(sizes), sizes.tolist(), 1 << (stream[0] >> 5), stream[0] & 31
    return rans(stream, layout, [table], [[]] * 3, (1, 1, count))


def rans(stream: memoryview, layout: Any, tables: list[list[int]], of_classes: list[Any], spans: Any) -> list[int]:
    """Returns all indices: the first chunk has the classes of rows, columns and positions that have tables before."""
    (at, sizes, lanes, precision), count, found, kinds = layout, math.prod(spans), [], None
    for begin, size in zip(range(0, count, 1 << 20), sizes, strict=True):
        states, at = np.frombuffer(stream[at : at + 4 * lanes], "<u4").tolist(), at + 4 * lanes + 2 * size
        coder = states, iter(np.frombuffer(stream[at - 2 * size : at], "<u2").tolist()), precision
        if kinds is None:
            each = [symbols(*coder, own, [0] * n) if own else [0] * n for own, n in zip(of_classes, spans, strict=True)]
            kinds = np.minimum(sum(np.ix_(*map(np.array, each))), len(tables) - 1).reshape(-1)
        found += symbols(*coder, tables, kinds[begin : begin + (1 << 20)].tolist())
        check(set(states) == {1 << 16} and next(coder[1], None) is None, "states of a stream")
    check(at == len(stream), "bytes of a stream")
    return found


def symbols(states: list[int], words: Any, precision: int, tables: list[list[int]], choices: list[int]) -> list[int]:
    """Returns the next symbols of a chunk, each by the table of frequencies that is chosen for it."""
    check(all(sum(table) == 1 << precision for table in tables), "frequencies")
    slots = [[(symbol, f, place) for symbol, f in enumerate(table) for place in range(f)] for table in tables]
    found, lanes, mask = [], len(states), (1 << precision) - 1
    for i, choice in enumerate(choices):
        symbol, frequency, place = slots[choice][(x := states[i % lanes]) & mask]
        x = frequency * (x >> precision) + place
        states[i % lanes] = x if x >> 16 else x << 16 | next(words)
        found.append(symbol)
    return found


def classes(stream: memoryview, axes: list[int], codewords: int, name: str) -> list[int]:
    """Returns indices of the same, with tables for kinds of places: sums of classes of row, column and position."""
    count, bit = math.prod(axes), Bits(stream)
    rows, columns = axes[:2] if len(axes) > 1 else (1, count)
    spans, precision, lanes, number = (rows, columns, count // rows // columns), bit(4), 1 << bit(3), bit(5) + 1
    of_classes = [list(bit.tables(1, number, 1 << precision)) if number > 1 < span else [] for span in spans]
    tables, at, more = list(bit.tables(number, codewords, 1 << precision)), -(-bit.at // 8), (count - 1) >> 20
    sizes, at = np.frombuffer(stream[at : at + 4 * more], "<u4").tolist(), at + 4 * more
    sizes.append((len(stream) - at - 4 * lanes * (more + 1)) // 2 - sum(sizes))
    return rans(stream, (at, sizes, lanes, precision), tables, of_classes, spans)


class Bits:
    """Reads numbers from bits, first bit highest."""

    def __init__(self, data: memoryview) -> None:
        self.text, self.at = "".join(f"{byte:08b}" for byte in data[: 1 << 16]), 0

    def __call__(self, width: int) -> int:  # noqa: D102
        self.at += width
        return int("0" + self.text[self.at - width : self.at], 2)

    def golomb(self, order: int) -> int:  # noqa: D102
        zeros = next(n for n in range(25) if self(1))
        return (1 << zeros + order | self(zeros + order)) - (1 << order)

    def tables(self, number: int, size: int, total: int) -> Iterator[list[int]]:
        """Yields frequencies from costs, which are a curve over the distance from a centre, or a list."""
        width = (size - 1).bit_length()
        centre, unit, order = self(width), self(2), self(2)
        for _ in range(number):
            knots, costs = self(4), {}
            if knots < 15:
                c = list(accumulate((self.golomb(order) << 3 - unit for _ in range(knots)), initial=0))
                for symbol in range(max(0, centre - (1 << knots) // 2), min(size, centre + (1 << knots) // 2 + 1)):
                    d = (n := abs(symbol - centre)) and (n - 1).bit_length()
                    rise = (c[d + 1] - c[d]) * (n - (1 << d) // 2) // ((1 << d) // 2) + c[d] if n > 1 else c[n]
                    costs[symbol] = min(127, rise)
            else:
                below, above = self(width), self(width)
                numbers = [-(x + 1 >> 1) if x & 1 else x >> 1 for x in map(self.golomb, [order] * (below + above + 1))]
                ups, downs = accumulate(numbers[: above + 1]), accumulate([numbers[0], *numbers[above + 1 :]])
                listed = {**{centre + i: c for i, c in enumerate(ups)}, **{centre - i: c for i, c in enumerate(downs)}}
                costs = {symbol: c << 3 - unit for symbol, c in listed.items() if c != 16 << unit}
            weights = [(EIGHTHS[costs[s] % 8] << 15) >> costs[s] // 8 if s in costs else 0 for s in range(size)]
            ends = [w * (total - len(costs)) // sum(weights) for w in accumulate(weights, initial=0)]
            yield [1 + ends[s + 1] - ends[s] if s in costs else 0 for s in range(size)]


def hashed(stream: memoryview, axes: list[int], codewords: int, name: str) -> Any:
    """Returns indices that follow from name, position and seed."""
    z = 0xCBF29CE484222325
    for byte in name.encode():
        z = (z ^ byte) * 0x100000001B3 % (1 << 64)
    keys = np.array([z ^ int.from_bytes(stream, "little")], np.uint64)
    for step in (np.uint64(0), np.arange(1, math.prod(axes) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)):
        keys = keys + step
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            keys = (keys ^ keys >> np.uint64(shift)) * np.uint64(factor)
    return (keys >> np.uint64(32)) * np.uint64(codewords) >> np.uint64(32)


CODECS: dict[str, Any] = {"bits": bits, "huffman": huffman, "ans": ans, "classes": classes, "hashed": hashed}

if __name__ == "__main__":
    np.savez(sys.argv[2], **read(sys.argv[1])) if len(sys.argv) == 3 else sys.exit(__doc__)
