"""Reads a packed file of timm-compressor: this one file, Python and numpy are all it needs.

    arrays = packed_reader.read("model.safetensors")         # a numpy array for each tensor, by name
    model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    python packed_reader.py model.safetensors model.npz      # from the shell, as a file of numpy.load

bfloat16, which numpy has not, comes as float32 of the same values; 8-bit floats come as bytes. The format: SPEC.md.
"""

import base64
import json
import math
import sys
import zlib
from itertools import accumulate
from typing import Any

import numpy as np

KINDS = {"F64": "<f8", "I64": "<i8", "U64": "<u8", "F32": "<f4", "I32": "<i4", "U32": "<u4", "F16": "<f2", "U8": "u1",
    "BF16": "<u2", "I16": "<i2", "U16": "<u2", "I8": "i1", "BOOL": "?", "F8_E5M2": "u1", "F8_E4M3": "u1"}  # fmt: skip
FLOATS = {"F32", "F16", "BF16"}
EIGHTHS = [65536, 60097, 55109, 50535, 46341, 42495, 38968, 35734]
DICTIONARY = zlib.decompress(base64.b85decode("l~~)7qc#xzl_@F@$%b(u3E$>152?yGOid^mWSa~KR)A+WiT^#_EiMw^Nm4s_O<#|?TdkIxR$f%Ii8fjFp&MD&g@Tt4m0zyyQ?tTkn^P{Efdy|xmA<3QMV6%;=zO5FO<L(&l6}l<ia~&HbY;rHs489W@YcJ#Dw$cqo=JprYPn}6+s+WuQG29iN;is}G5fuc-<4rxjV+{GBXyIvd8IA#L4cId!MI-8wt8d0TASZgQdd?hK|o0>Plb9SiK4pXZPKI?2yOMQbW-Nulp*&|ppKeP@Fc1{sq85&KpVxLvb<^gucObRVSSv(@D>gCNj<W!i5spN@BL;2=aXww{V}7LMGaAAt5iOtdI6nLmy&!{(znT0Z8F!UyU3}KYT2e&8&PLf=X5<L(Y!_-PNOW-sH{uXY#kF@eXFI;X5gV%^b$M(*Ym}5k`)UoBMYuoj$2FnVG_NzON)D&>9o%EB`K90>u5_nKJsqTJkcs>Q<0TdcI4qMehY(T<yeqG_`2U6LU<NJ6!B3?M0-9L8_LQvg@Q{VJ_!YcZ+vADA$$$eLN-l)&S6(M%qR*OKSU_7D2GvO7l$llJNP3*7zAoNlO5oNA{5A;7fk&z$;A<w3E8?};aH60kjFDoz9_;0+&0`ga$;GMQ+S-z&+2lLnesf)0$D)DRTI4Y6%?h%dkM-aQw4IQxsXJzlk^HLGI(KOpt~}m;G;H+?m&^HBDGUqD6QI?NSaa>MFRN<CcZkK^E6kw1(D?BauA<Z-=Op5`nyBFK@&Xz%!G2ub_wS(vPWFyC28_MK~(V2K`9m}BL`=zpvOYn2N;eoOV|>uc>v~8?0{0Ksp<qpf!=)WWOEIAVx2-5qs?Kz^$AA=S$Ay@`c;ImAbj4C(JE6{c(PO)EJ7@Et)u~)xQ#(N+HAxA0r{rQX0*E_86S`qZ+G|^?HqZ|k0E}>^yzEygDWYv0=czOuzgYmyG>s(DDJvbg|KJqK5l30gw4d^Z*`Sv2Ty=*s+-bMr-}k!*1=0_It7-YR8OW?z?|bK5xj6%ThLUUNhzmB=K86ri=1+r$yTDUwz-eS{GB07VCcEjaL|HRt6^&bUT<*RTVS5xGjj?h%i(Nq9NilL%q+ezDAc*N6;n$C3b0%(K*si4u?HNcD-iu_6#l1wm=2{NAE4TN)dqvP(OpphqlM~J=nPYo<!Os@;6b(kld0!u4=7qC(<@{MaN`&R2-~V=sAS)5Rn{_nCoh}heT)Kau{JMDP{wmjFw}<k=d>!pWz$q>H^M`Y?3(ln?{I*{8}@VBF#((DZkG(W{|ZXn#k7fDe*Y2oJo|g|g*xw-zuj*A<)<Goynx#VoPgdP$~#tUgCwKUyrznw5tH1U$doNTI1HeIx)#PSTpdIaC#<|E@D0jT)m3`6eeGgomdG^iN_wT)FUeFYzr#Cf7KThj5$J)vuI?>Tw*csJkS1zXV{OPxmLGu=gA>-yOAMeu>!UK6eY=<n?FBGTVvcf6l?67S+zV_0edxZpfhnLpXsY7s-1cr8C_6AhD31H-Jvn{vmpoDw<k_NS4)tuRa%Kyr)ekHo;SnL=#(KTKSx_0Za%dB{gr=;j_DU^-j6s@fWoY1r&5IO!-Z(+Kzdgw47(FLwaPa=Gs5#r>(+~m(fB}iBs(0L|ufeZu7xc5juY%)Y9%A!}-;i=Kc@~7vSRfc(U`$k8H!^6BfI6?CYdk|Iq=?%oW}qH`2*bhNrNyLtbV(fJ^R>$j^$=T3VQ__B1;K|e-T7QXFMspJaIb`;@Fas_vrDAS=*=J^+=qZBniN872l^=@>hDu_fbmsH8`jJmUAEBSt2(^*B0Mkb6EDK?A{IL9UgF-%*73rZYr*C*sB9fK+l3PMmGB|0oujq)v{r83lSdj8_dUpi2a>IU9Q_>}e}{$EBb3J}wUaBcj0aZzsKngTU`svj>)~Vdyt3e)-g;05w-gmNR0tCuShfasa_UwI6AQhEV24U!ZmGn}&};$Mq~#V1+b;CDuZNG-bIXP8J-zkN3~p^`hKgYa4=h^)J2`c0h8-4q55XRXmU49KlarEg?_@aQM)6^|{G3zoHn+tZ;BGO+IQ2M}=&@}$m*sJjFKOJlfa6Wn_GA%Fdmg&G{FXO%sKVc9;2^*zf2TXwaQAlHE-Boju!Rg8WiW2k>;)SFCLTb5!{zQZiFpus?|V-3eyQ`BY{iKCV+6s2-Svhex|@T~A@)DQQ3@ejoo=hnP5^M4{6Z&Ye{jAAzwKi9ug@vo%V<DTO#(wZj-7s_|3!d*Ccys90{h&;B9<$XK^RSwfc>!qe0smQc<Xt@;j0|>P=_saXuxo$5=^3BJMM2iUIDE#yp^v=utzr8+-882%Y=+J;MC>k1t}JLOgxO8c(gLHvNeRWRbhO=a-2X>-<kTW+cUhd9-YB2K1|;QcS7$Dhqxcc?O~n1IX6pw{|5"), -15)  # noqa: E501  # fmt: skip


def read(path: str) -> dict[str, Any]:
    """Returns an array for each tensor of a file, by its name in the state dict; ValueError where it is damaged."""
    data = np.fromfile(path, "u1").tobytes()
    try:
        with np.errstate(all="ignore"):
            return tensors_of(*opened(data))
    except Exception as why:  # whatever a hostile file leads to
        raise ValueError(f"{path} cannot be read: {why if type(why) is ValueError else repr(why)}"[:400]) from why


def tensors_of(meta: dict[str, Any], take: "Parts") -> dict[str, Any]:
    """Returns the arrays; what they take is bounded before the first is made."""
    sites = [(*site, {})[:6] for site in meta.get("sites", [])]
    raws = [(name, [*raw, raw[0]][:4]) for raw in meta.get("untouched", []) for name in raw[2].split(" ")]
    sizes = [s for _, s, *_ in (*sites, *(raw for _, raw in raws))] + [b[3:4] for b in meta.get("books", []) if b[3:]]
    check(all(type(n) is int and 0 <= n < 1 << 31 for shape in sizes for n in shape), "a size of a tensor")
    check(8 * sum(map(math.prod, sizes)) <= max(1 << 29, 2000 * len(take.data)), "it asks for too much memory")
    streams = [take(site[4]) for site in sites]
    books = [read_book(book, take) for book in meta.get("books", [])]
    affine, tensors = list[Any](), dict[str, Any]()
    for name, shape, book, _, _, o in sites:
        check(type(book) is int and 0 <= book < len(books) and o.get("dtype", "F32") in FLOATS, f"a field of {name!r}")
        groups = shape[o["axis"]] if "axis" in o else -(-math.prod(shape) // o["block"]) if "block" in o else 1
        affine.append([read_values(take, o[key], [groups], "F32") if key in o else None for key in ("scale", "offset")])
    for name, (kind, shape, _, stored) in raws:
        dtype = "<f4" if kind == "BF16" else KINDS[kind]  # of one value, which all entries have
        tensors[name] = read_values(take, stored, shape, kind) if type(stored) is str else np.full(shape, stored, dtype)
    take.check_sums()
    for site, stream, (scale, offset) in zip(sites, streams, affine, strict=True):
        names, weights = site[0].split(" "), decode(site, stream, books[site[2]], scale, offset)
        tensors |= zip(names, weights if len(names) > 1 else [weights], strict=True)
    return {**tensors, **{alias: tensors[name] for alias, name in meta.get("aliases", {}).items()}}


def check(holds: object, what: str) -> None:
    """Raises ValueError unless something holds."""
    if not holds:
        raise ValueError(what)


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
        spans = [*zip(self.cuts, [*self.cuts[1:], self.at], strict=False), *[(0, self.start)] * (2 - self.version)]
        sums = b"".join(zlib.crc32(self.data[a:b]).to_bytes(4, "little") for a, b in spans)
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
        check(0 < size <= min(1 << 24, (1 << 18) + 32 * deflated), "size of the metadata")
        text = (inflate := zlib.decompressobj(-15, zdict=DICTIONARY)).decompress(data[head + 8 : start - 4], size + 1)
        check(len(text) == size and inflate.eof and not inflate.unused_data, "size of the metadata")
    return json.loads(text), Parts(data, start, version)


def rounded(values: Any, kind: str) -> Any:
    """Returns values rounded to a float dtype, ties to even; BF16 as float32."""
    if kind != "BF16":
        return values.astype(KINDS[kind])
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return np.where(np.isnan(values), np.float32("nan"), (bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000).view("f4"))


def read_values(take: Parts, stored: str, shape: list[int], kind: str) -> Any:
    """Returns so many values, which are stored as one dtype, as another."""
    check(stored == kind or {stored, kind} <= FLOATS, f"dtype {stored!r}")
    values = np.frombuffer(take(math.prod(shape) * np.dtype(KINDS[stored]).itemsize), KINDS[stored]).copy()
    check(stored != "BOOL" or not (values.view("u1") > 1).any(), "values of BOOL")
    values = (values.astype(np.uint32) << 16).view(np.float32) if stored == "BF16" else values
    return (values if stored == kind else rounded(values, kind)).reshape(shape)


def read_book(book: list[Any], take: Parts) -> Any:
    """Returns the codewords, float32[B, K, d]."""
    if book[0] in ("grid", "steps"):
        check(0 < book[3] <= 1 << 16, "codewords of a grid")
        start, step = book[1:3] if book[0] == "grid" else (book[1] * (step := float(np.float32(book[2]))), step)
        return (start + np.arange(book[3]) * np.float64(step)).astype(np.float32).reshape(1, -1, 1)
    shape = book[1] if isinstance(book[1], list) else [1, book[1], 1]
    values = read_values(take, book[0], shape, "F32")
    return np.concatenate([values, -values], 1) if "mirrored" in book[2:] else values


def spread(values: Any, shape: list[int], o: dict[str, Any]) -> Any:
    """Returns one value a group in a shape that broadcasts over the tensor."""
    if "block" not in o:
        return values.reshape([-1 if axis == o.get("axis") else 1 for axis in range(len(shape))])
    count, block = math.prod(shape), o["block"]
    check(len(values) == -(-count // block), "number of groups")
    return np.repeat(values, min(block, count))[:count].reshape(shape)


def decode(site: Any, stream: memoryview, table: Any, scale: Any, offset: Any) -> Any:
    """Returns values[book[g], index] * scale[g] + offset[g], in float32, then rounded to the dtype of the site."""
    name, shape, _, codec, _, options = site
    (books, codewords, d), axis = table.shape, range(len(shape) or 1)[options.get("vector_axis", 0)]
    axes = [*shape[:axis], *shape[axis + 1 :], -(-shape[axis] // d)] if d > 1 else shape
    known = codec in CODECS and codewords <= 1 << {"bits": 20, "hashed": 20, "classes": 14}.get(codec, 15)
    check(known, f"codec {codec!r} of {codewords} codewords, which this reader does not know")
    indices = np.asarray(CODECS[codec](stream, axes, codewords, name) if math.prod(axes) else [], "i8").reshape(axes)
    check(not indices.size or indices.max() < codewords, f"an index of {name!r}")
    table = table[..., : shape[axis] if d > 1 else 1]  # what exceeds a row is in no tensor
    if books > 1:  # with vectors, all entries of a row are in one group
        start = np.broadcast_to(spread(np.arange(books) * codewords, shape, options), shape)
        indices = indices + (np.moveaxis(start, axis, -1)[..., :1] if d > 1 else start)
    weights = table.reshape(books * codewords, -1)[indices].reshape([*axes[:-1], -1] if d > 1 else shape)
    weights = np.moveaxis(weights[..., : shape[axis]], -1, axis) if d > 1 else weights
    weights = weights if scale is None else weights * spread(scale, shape, options)
    weights = weights if offset is None else weights + spread(offset, shape, options)
    return rounded(np.ascontiguousarray(weights), options.get("dtype", "F32"))


def bits(stream: memoryview, axes: list[int], codewords: int, name: str) -> Any:
    """Returns indices of a fixed length, the lowest bit first."""
    count, width = math.prod(axes), (codewords - 1).bit_length()
    flat = np.unpackbits(np.frombuffer(stream, np.uint8), bitorder="little")
    check(len(stream) == -(-count * width // 8) and not flat[count * width :].any(), f"bytes of {name!r}")
    return sum((flat[at : count * width : width].astype("i8") << at for at in range(width)), np.zeros(count, "i8"))


def huffman(stream: memoryview, axes: list[int], codewords: int, name: str) -> Any:
    """Returns indices of a canonical code: what begins at each bit is looked up at once, then followed."""
    count, at, found = math.prod(axes), (codewords + 1) // 2, []
    lengths = [half for byte in stream[:at] for half in (byte & 15, byte >> 4)][:codewords]
    used, longest = sorted((n, index) for index, n in enumerate(lengths) if n), max(lengths)
    widths = [1 << longest - n for n, _ in used]
    check(sum(widths) == 1 << longest or [n for n, _ in used] == [1], f"codes of {name!r}")
    length_of, index_of = np.repeat([*used, (0, 0)], [*widths, (1 << longest) - sum(widths)], axis=0).T
    sizes = np.frombuffer(stream[at : at + 4 * -(-count >> 16)], "<u4").tolist()
    at += 4 * len(sizes)
    check(at + sum(sizes) == len(stream) and max(sizes) <= 15 << 13, f"chunks of {name!r}")
    for begin, size in zip(range(0, count, 1 << 16), sizes, strict=True):
        flat = np.pad(np.unpackbits(np.frombuffer(stream[at : at + size], np.uint8)).astype(np.int64), (0, longest))
        coming: Any = sum(flat[bit : len(flat) - longest + bit] << longest - 1 - bit for bit in range(longest))
        to, at = (np.arange(len(coming)) + length_of[coming]).tolist(), at + size
        places = list(accumulate(range(1, min(1 << 16, count - begin)), lambda p, _: to[p], initial=0))  # noqa: B023
        whole = length_of[coming[places]].all() and not flat[(end := to[places[-1]]) :].any() and -(-end // 8) == size
        check(whole, f"a chunk of {name!r}")
        found.append(index_of[coming[places]])
    return np.concatenate(found)


def ans(stream: memoryview, axes: list[int], codewords: int, name: str) -> Any:
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


def rans(stream: memoryview, layout: Any, tables: list[list[int]], own: list[Any], spans: Any) -> Any:
    """Returns all indices: the first chunk has the classes of rows, columns and positions that have tables before."""
    (at, sizes, lanes, precision), count, found, kinds = layout, math.prod(spans), [], None
    check(precision <= 16 and min(sizes) >= 0 and len(sizes) == -(-count >> 20), "precision or sizes of a stream")
    for begin, size in zip(range(0, count, 1 << 20), sizes, strict=True):
        states, at = np.frombuffer(stream[at : at + 4 * lanes], "<u4").tolist(), at + 4 * lanes + 2 * size
        coder = states, iter(np.frombuffer(stream[at - 2 * size : at], "<u2").tolist()), precision
        if kinds is None:
            each = [symbols(*coder, t, bytes(n)) if t else np.zeros(n, "u1") for t, n in zip(own, spans, strict=True)]
            kinds = np.minimum(sum(np.ix_(*each)), len(tables) - 1).astype("u1").tobytes()
        found.append(symbols(*coder, tables, kinds[begin : begin + (1 << 20)]))
        check(set(states) == {1 << 16} and next(coder[1], None) is None, "states of a stream")
    check(at == len(stream), "bytes of a stream")
    return np.concatenate(found)


def symbols(states: list[int], words: Any, precision: int, tables: list[list[int]], choices: bytes) -> Any:
    """Returns the next symbols of a chunk, each by the table of frequencies that is chosen for it."""
    check(all(sum(table) == 1 << precision for table in tables) and min(states) >> 16, "frequencies or states")
    slots = [[(symbol, f, place) for symbol, f in enumerate(table) for place in range(f)] for table in tables]
    found, lanes, mask = [], len(states), (1 << precision) - 1
    for i, choice in enumerate(choices):
        symbol, frequency, place = slots[choice][(x := states[i % lanes]) & mask]
        x = frequency * (x >> precision) + place
        states[i % lanes] = x if x >> 16 else x << 16 | next(words)
        found.append(symbol)
    return np.array(found, "u2")


def classes(stream: memoryview, axes: list[int], codewords: int, name: str) -> Any:
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
        self.text, self.at = f"{int.from_bytes(data[: 1 << 20], 'big'):0{8 * len(data[: 1 << 20])}b}", 0

    def __call__(self, width: int) -> int:  # noqa: D102
        self.at += width
        return int("0" + self.text[self.at - width : self.at], 2)

    def golomb(self, order: int) -> int:  # noqa: D102
        zeros = next(n for n in range(25) if self(1))
        return (1 << zeros + order | self(zeros + order)) - (1 << order)

    def tables(self, number: int, size: int, total: int) -> Any:
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
            check(
                0 < len(costs) <= total and {*costs} <= {*range(size)} and {*costs.values()} <= {*range(129)}, "costs"
            )
            weights = [(EIGHTHS[costs[s] % 8] << 15) >> costs[s] // 8 if s in costs else 0 for s in range(size)]
            ends = [w * (total - len(costs)) // sum(weights) for w in accumulate(weights, initial=0)]
            yield [1 + ends[s + 1] - ends[s] if s in costs else 0 for s in range(size)]


def hashed(stream: memoryview, axes: list[int], codewords: int, name: str) -> Any:
    """Returns indices that follow from name, position and seed."""
    z = 0xCBF29CE484222325
    for byte in name.encode():
        z = (z ^ byte) * 0x100000001B3 % (1 << 64)
    check(len(stream) == 8, f"seed of {name!r}")
    keys = np.array([z ^ int.from_bytes(stream, "little")], np.uint64)
    for step in (np.uint64(0), np.arange(1, math.prod(axes) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)):
        keys = keys + step
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            keys = (keys ^ keys >> np.uint64(shift)) * np.uint64(factor)
    return (keys >> np.uint64(32)) * np.uint64(codewords) >> np.uint64(32)


CODECS: dict[str, Any] = {"bits": bits, "huffman": huffman, "ans": ans, "classes": classes, "hashed": hashed}

if __name__ == "__main__":
    np.savez(sys.argv[2], **read(sys.argv[1])) if len(sys.argv) == 3 else sys.exit(__doc__)
