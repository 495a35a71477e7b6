"""A second reader of the codecs ``ans`` and ``classes``, from SPEC.md alone: slow, without numpy, sharing no code."""

from __future__ import annotations

import struct

EIGHTHS = [65536, 60097, 55109, 50535, 46341, 42495, 38968, 35734]
CHUNK = 1 << 20


def ans(stream: bytes, count: int, codewords: int, name: str) -> list[int]:
    if not count:
        return []
    precision, lanes = stream[0] & 31, 1 << (stream[0] >> 5)
    at = 1 + (codewords + 1) // 2
    lengths = [half for byte in stream[1:at] for half in (byte & 15, byte >> 4)][:codewords]
    size = -(-sum(max(0, length - 1) for length in lengths) // 8)
    low, at = int.from_bytes(stream[at : at + size], "little"), at + size
    owners = []  # of each slot: index, frequency, place
    for index, length in enumerate(lengths):
        below = max(0, length - 1)
        f = (1 << below | low & (1 << below) - 1) if length else 0
        low >>= below
        owners += [(index, f, place) for place in range(f)]
    assert len(owners) == 1 << precision
    chunks = -(-count // (1 << 20))
    sizes = struct.unpack_from(f"<{chunks}I", stream, at)
    at, out = at + 4 * chunks, []
    for chunk, size in enumerate(sizes):
        states = list(struct.unpack_from(f"<{lanes}I", stream, at))
        words = list(struct.unpack_from(f"<{size}H", stream, at + 4 * lanes))[::-1]
        at += 4 * lanes + 2 * size
        for i in range(min(1 << 20, count - (chunk << 20))):
            x = states[i % lanes]
            index, f, place = owners[x % (1 << precision)]
            x = f * (x >> precision) + place
            states[i % lanes] = x << 16 | words.pop() if x < 1 << 16 else x
            out.append(index)
        assert (words, set(states)) == ([], {1 << 16})
    return out


class Bits:
    """Reads numbers from bits, first bit highest."""

    def __init__(self, data: bytes) -> None:
        self.bits, self.at = "".join(f"{byte:08b}" for byte in data), 0

    def number(self, width: int) -> int:
        self.at += width
        return int("0" + self.bits[self.at - width : self.at], 2)

    def golomb(self, order: int) -> int:
        zeros = 0
        while self.number(1) == 0:
            zeros += 1
        assert zeros <= 24
        return (1 << zeros + order | self.number(zeros + order)) - (1 << order)

    def signed(self, order: int) -> int:
        number = self.golomb(order)
        return number // 2 if number % 2 == 0 else -(number + 1) // 2


def costs(bits: Bits, centre: int, unit: int, order: int, symbols: int) -> list[int | None]:
    """Reads one table: the cost of each symbol in eighths of a bit, None for one that is not used."""
    width, knots = (symbols - 1).bit_length(), bits.number(4)
    found: list[int | None] = [None] * symbols
    if knots == 15:
        below, above = bits.number(width), bits.number(width)
        centre_cost = cost = bits.signed(order)
        listed = {centre: cost}
        for symbol in range(centre + 1, centre + above + 1):
            listed[symbol] = cost = cost + bits.signed(order)
        cost = centre_cost
        for symbol in range(centre - 1, centre - below - 1, -1):
            listed[symbol] = cost = cost + bits.signed(order)
        for symbol, cost in listed.items():
            assert 0 <= cost <= 16 << unit
            found[symbol] = None if cost == 16 << unit else cost << 3 - unit
        return found
    heights = {0: 0}  # by distance
    for knot in range(knots):
        heights[1 << knot] = max(heights.values()) + (bits.golomb(order) << 3 - unit)
    for symbol in range(symbols):
        distance = abs(symbol - centre)
        if distance > max(heights):
            continue
        left = max(place for place in heights if place <= distance)
        right = min(place for place in heights if place >= distance)
        rise = (heights[right] - heights[left]) * (distance - left) // max(1, right - left)
        found[symbol] = min(127, heights[left] + rise)
    return found


def slots(table: list[int | None], precision: int) -> list[tuple[int, int, int]]:
    """Symbol, frequency and place of each slot."""
    weights = [0 if cost is None else (EIGHTHS[cost % 8] << 15) // (1 << cost // 8) for cost in table]
    free = (1 << precision) - sum(cost is not None for cost in table)
    assert free >= 0
    owners, total = [], 0
    for symbol, cost in enumerate(table):
        before, total = total, total + weights[symbol]
        if cost is not None:
            frequency = 1 + total * free // sum(weights) - before * free // sum(weights)
            owners += [(symbol, frequency, place) for place in range(frequency)]
    assert len(owners) == 1 << precision
    return owners


class Coder:
    """The states and words of one chunk."""

    def __init__(self, data: bytes, lanes: int, precision: int) -> None:
        self.states: list[int] = list(struct.unpack_from(f"<{lanes}I", data))
        self.words = list(struct.unpack_from(f"<{len(data) // 2 - 2 * lanes}H", data, 4 * lanes))[::-1]
        self.precision = precision

    def decode(self, table: list[tuple[int, int, int]], i: int) -> int:
        """Reads the symbol that is i-th in its lane's turn."""
        lane = i % len(self.states)
        x = self.states[lane]
        symbol, f, place = table[x % (1 << self.precision)]
        x = f * (x >> self.precision) + place
        self.states[lane] = x << 16 | self.words.pop() if x < 1 << 16 else x
        return symbol

    def finish(self) -> None:
        """All is read."""
        assert (self.words, set(self.states)) == ([], {1 << 16})


def chunks_of(stream: bytes, at: int, count: int, lanes: int) -> list[bytes]:
    """Cuts what follows the tables into chunks: states and words of each."""
    sizes = list(struct.unpack_from(f"<{count - 1}I", stream, at))
    at += 4 * (count - 1)
    sizes.append((len(stream) - at - 4 * lanes * count) // 2 - sum(sizes))
    cut = []
    for size in sizes:
        cut.append(stream[at : at + 4 * lanes + 2 * size])
        at += len(cut[-1])
    assert at == len(stream)
    return cut


def classes(stream: bytes, shape: list[int], codewords: int) -> list[int]:
    """Reads a stream of indices of a shape."""
    count = 1
    for size in shape:
        count *= size
    if not count:
        return []
    rows, columns = shape[:2] if len(shape) > 1 else (1, count)
    positions = count // rows // columns
    bits = Bits(stream)
    precision, lanes, tables = bits.number(4), 1 << bits.number(3), 1 + bits.number(5)

    def read(number: int, symbols: int) -> list[list[tuple[int, int, int]]]:
        centre, unit, order = bits.number((symbols - 1).bit_length()), bits.number(2), bits.number(2)
        return [slots(costs(bits, centre, unit, order, symbols), precision) for _ in range(number)]

    sizes = [size if tables > 1 and size > 1 else 0 for size in (rows, columns, positions)]
    owners_of_classes = [read(1, tables) if size else [] for size in sizes]
    owners = read(tables, codewords)
    assert set(bits.bits[bits.at : -(-bits.at // 8) * 8]) <= {"0"}
    of_axes: list[list[int]] = []
    out: list[int] = []
    for chunk, data in enumerate(chunks_of(stream, -(-bits.at // 8), -(-count // CHUNK), lanes)):
        coder = Coder(data, lanes, precision)
        if not chunk:
            for length, size, found in zip((rows, columns, positions), sizes, owners_of_classes, strict=True):
                of_axes.append([coder.decode(found[0], i) for i in range(size)] or [0] * length)
        for i in range(min(CHUNK, count - chunk * CHUNK)):
            place = chunk * CHUNK + i
            row, column, position = place // positions // columns, place // positions % columns, place % positions
            table = min(of_axes[0][row] + of_axes[1][column] + of_axes[2][position], tables - 1)
            out.append(coder.decode(owners[table], i))
        coder.finish()
    return out
