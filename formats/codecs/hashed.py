"""Indices that are generated instead of stored: an integer hash of tensor name, position and seed.

Chen, Wilson, Tyree, Weinberger and Chen, "Compressing Neural Networks with the Hashing Trick", ICML 2015.
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

_CHUNK = 1 << 16  # positions hashed at a time, so that they stay in the cache
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@register
@dataclass(frozen=True)
class Hashed(Codec):
    """Stores the seed alone (u64); the indices are those of ``hashed_indices``.

    With a mirrored codebook the hash ranges over both halves, so that one hash decides value and sign.

    Args:
        seed: the seed of the hash, from 0 (default) to 2**64 - 1.
    """

    id: ClassVar[str] = "hashed"
    general: ClassVar[bool] = False
    seed: int = 0

    def encode(self, indices: NDArray[Any], stream: Stream) -> bytes:
        """Returns the seed as eight bytes.

        Raises:
            UsageError: ``indices`` are not those that the seed generates.
        """
        expected = hashed_indices(stream.name, stream.count, stream.codewords, self.seed)
        if not np.array_equal(indices, expected):
            raise UsageError(f"indices of {stream.name!r} are not those the hash gives for seed {self.seed}")
        return self.seed.to_bytes(8, "little")

    @classmethod
    def of(cls, data: memoryview, stream: Stream) -> Hashed:
        """Returns the codec with the stored seed; FormatError unless there are exactly 8 bytes."""
        if len(data) != 8:
            raise FormatError(f"indices of {stream.name!r}: {len(data)} bytes, expected the 8 of a seed")
        return cls(int.from_bytes(data, "little"))

    def decode(self, data: memoryview, stream: Stream) -> NDArray[Any]:
        """Returns the indices that the stored seed generates."""
        return hashed_indices(stream.name, stream.count, stream.codewords, self.of(data, stream).seed)

    def generate(self, stream: Stream, positions: Any) -> Any:
        """Replaces int64 positions, of numpy or torch, by their indices; the result is the same on every device."""
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
        """Returns 0 bits for every codeword."""
        return np.zeros(len(histogram))

    def max_count(self, size: int, codewords: int) -> int | None:
        """Returns None: a seed generates any number of indices."""
        return None


def hashed_indices(name: str, count: int, codewords: int, seed: int = 0) -> NDArray[Any]:
    """Returns the generated indices of a tensor.

    With key = mix(FNV-1a-64(UTF-8 name) xor seed), position i is hashed to h = mix(key + (i + 1) * golden), modulo
    2**64; its index is the high 32 bits of h, times K, shifted right by 32. The bias is below K / 2**32.

    Args:
        name: the name of the tensor.
        count: the number n of positions.
        codewords: the number K of codewords.
        seed: from 0 (default) to 2**64 - 1.

    Returns:
        uint[n] of ``index_dtype(K)``.

    Raises:
        UsageError: the seed is out of range.

    Example:
        >>> hashed_indices("fc.weight", 6, 100).tolist()
        [3, 59, 66, 25, 57, 27]
    """
    stream, codec = Stream(name, count, codewords), Hashed(seed)
    indices = np.empty(count, index_dtype(codewords))
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count)
        indices[start:stop] = codec.generate(stream, np.arange(start, stop, dtype=np.int64))
    return indices


def _key(name: str, seed: int) -> int:
    """Returns the key of a tensor as a signed number of 64 bits."""
    if not 0 <= seed <= _MASK:
        raise UsageError(f"seed {seed} of the hash, expected 0 to 2**64 - 1")
    words = np.array([_signed(_fnv1a(name.encode()) ^ seed)])
    _mix(words)
    return int(words[0])


def _fnv1a(data: bytes) -> int:
    """Returns the 64-bit FNV-1a hash."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 & _MASK
    return value


def _signed(word: int) -> int:
    """Returns the signed number with the same 64 bits."""
    return word - (1 << 64) if word >> 63 else word


def _mix(words: Any) -> None:
    """Mixes the bits of each word in place, by the finaliser of splitmix64.

    Words are int64, since torch has no uint64 arithmetic. Products wrap around as unsigned ones do; right shifts copy
    the sign bit, which the masks remove.
    """
    words ^= words >> 30 & (1 << 34) - 1
    words *= _signed(0xBF58476D1CE4E5B9)
    words ^= words >> 27 & (1 << 37) - 1
    words *= _signed(0x94D049BB133111EB)
    words ^= words >> 31 & (1 << 33) - 1
