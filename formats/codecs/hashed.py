"""Indices that are not stored: a hash of (tensor name, position, seed) gives them.

Chen, Wilson, Tyree, Weinberger, Chen, "Compressing Neural Networks with the Hashing Trick", 2015.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from compressor.formats.codecs.base import Codec, Stream
from compressor.formats.codecs.registry import register
from compressor.formats.content import index_dtype
from compressor.formats.errors import FormatError, UsageError

__all__ = ["Hashed", "hashed_indices"]

_BLOCK = 1 << 16  # positions hashed at a time: fits the cache
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@register
@dataclass(frozen=True)
class Hashed(Codec):
    """The stream is the seed alone, u64 little-endian; the indices are ``hashed_indices``.

    With a mirrored codebook the hash runs over both halves: index and sign come from one hash.
    """

    id: ClassVar[str] = "hashed"
    general: ClassVar[bool] = False
    seed: int = 0

    def encode(self, indices: NDArray[Any], stream: Stream) -> bytes:
        """Give the seed; raises UsageError where ``indices`` are not the generated ones."""
        expected = hashed_indices(stream.name, stream.count, stream.codewords, self.seed)
        if not np.array_equal(indices, expected):
            raise UsageError(f"indices of {stream.name!r} are not those the hash gives for seed {self.seed}")
        return self.seed.to_bytes(8, "little")

    @classmethod
    def of(cls, data: memoryview, stream: Stream) -> Hashed:
        """Read the seed; raises FormatError unless there are exactly 8 bytes."""
        if len(data) != 8:
            raise FormatError(f"indices of {stream.name!r}: {len(data)} bytes, expected the 8 of a seed")
        return cls(int.from_bytes(data, "little"))

    def decode(self, data: memoryview, stream: Stream) -> NDArray[Any]:
        """Generate the indices from the stored seed."""
        return hashed_indices(stream.name, stream.count, stream.codewords, self.of(data, stream).seed)

    def generate(self, stream: Stream, positions: Any) -> Any:
        """Hash positions to indices, in place: int64 of numpy or torch, and the same on every device."""
        positions += 1
        positions *= _signed(_GOLDEN)
        positions += _key(stream.name, self.seed)
        _mix(positions)
        positions >>= 32
        positions &= (1 << 32) - 1
        positions *= stream.codewords
        positions >>= 32
        return positions

    def code_lengths(self, histogram: NDArray[np.int64]) -> NDArray[np.float64]:
        """Cost nothing."""
        return np.zeros(len(histogram))

    def max_count(self, size: int, codewords: int) -> int | None:
        """Know no bound: the seed gives any number of indices."""
        return None


def hashed_indices(name: str, count: int, codewords: int, seed: int = 0) -> NDArray[Any]:
    """Give the index of every position of the tensor ``name``, uint[count] below ``codewords``.

    The key is FNV-1a 64 of the UTF-8 name, xor the seed, mixed. Position i gives mix(key + (i + 1) * golden),
    whose high 32 bits are scaled to the codewords by multiply and shift: the bias is below codewords / 2**32.

    Example:
        >>> hashed_indices("fc.weight", 6, 100).tolist()
        [3, 59, 66, 25, 57, 27]
    """
    stream, codec = Stream(name, count, codewords), Hashed(seed)
    indices = np.empty(count, index_dtype(codewords))
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        indices[start:stop] = codec.generate(stream, np.arange(start, stop, dtype=np.int64))
    return indices


def _key(name: str, seed: int) -> int:
    """Give the key of a tensor, as the signed number of the same 64 bits."""
    if not 0 <= seed <= _MASK:
        raise UsageError(f"seed {seed} of the hash, expected 0 to 2**64 - 1")
    words = np.array([_signed(_fnv1a(name.encode()) ^ seed)])
    _mix(words)
    return int(words[0])


def _fnv1a(data: bytes) -> int:
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 & _MASK
    return value


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _mix(words: Any) -> None:
    """Mix each word in place: the finaliser of splitmix64.

    Words are int64, for torch has no arithmetic of uint64; products wrap around all the same, and shifts are masked,
    for those of signed numbers draw the sign after them.
    """
    words ^= words >> 30 & (1 << 34) - 1
    words *= _signed(0xBF58476D1CE4E5B9)
    words ^= words >> 27 & (1 << 37) - 1
    words *= _signed(0x94D049BB133111EB)
    words ^= words >> 31 & (1 << 33) - 1
