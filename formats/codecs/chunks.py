"""Chunks of rANS streams: how many indices they hold, in how many lanes, and where they are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from compressor.formats.codecs.kernels import LOW
from compressor.formats.errors import FormatError

__all__ = ["CHUNK", "lanes_for", "split_chunks"]

CHUNK = 1 << 20
"""Indices in a chunk, which can be decoded on its own."""

_MAX_LANES = 8  # states that are updated in turn, so that the processor computes several at once
_BYTES_PER_LANE = 4096  # coded bytes of a chunk that justify a lane, whose state costs about 3 bytes


def lanes_for(size: int, count: int) -> int:
    """Returns the number of lanes that ``count`` indices justify which are coded in ``size`` bytes."""
    return min(_MAX_LANES, 1 << (size // -(-count // CHUNK) // _BYTES_PER_LANE).bit_length())


def split_chunks(
    data: memoryview, count: int, lanes: int, what: str, last_size: bool = True
) -> list[tuple[NDArray[np.int64], NDArray[np.uint16]]]:
    """Returns the states, int64[lanes], and words, uint16, of each of ``count`` chunks, whose sizes come first.

    Args:
        data: sizes and chunks.
        count: the number of chunks, 1 or more.
        lanes: the number of states of each.
        what: what messages call the stream.
        last_size: whether the size of the last chunk is there, as by default; otherwise that has what is left.

    Raises:
        FormatError: there are more or fewer bytes than that, or a state is too small.
    """
    stored = count if last_size else count - 1
    if len(data) < 4 * stored:
        raise FormatError(f"{what}: {len(data)} bytes, expected the sizes of {stored} chunks")
    sizes = np.frombuffer(data[: 4 * stored], "<u4").tolist()
    expected = 4 * stored + 4 * lanes * count + 2 * sum(sizes)
    if not last_size:
        sizes.append(max(0, len(data) - expected) // 2)
        expected += 2 * sizes[-1]
    if len(data) != expected:
        raise FormatError(f"{what}: {len(data)} bytes after the frequencies, expected {expected}")
    chunks = []
    position = 4 * stored
    for size in sizes:
        states = np.frombuffer(data[position : position + 4 * lanes], "<u4").astype(np.int64)
        if states.min() < LOW:
            raise FormatError(f"{what}: a state below {LOW}")
        position += 4 * lanes
        chunks.append((states, np.frombuffer(data[position : position + 2 * size], "<u2")))
        position += 2 * size
    return chunks
