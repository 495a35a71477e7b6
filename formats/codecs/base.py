"""Codecs: how the indices of one tensor become bytes.

A codec is one file in ``codecs/``, or in a package of its own: a frozen dataclass, constructible with no arguments,
registered by ``registry.register``. Nothing else is edited; the contract tests find it in ``registry.CODECS``.
Whatever a decoder needs beyond the ``Stream`` below is in the bytes themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from compressor.formats.codecs.bitpacking import take
from compressor.formats.errors import FormatError, UsageError

__all__ = ["Codec", "Stream", "check_indices"]


@dataclass(frozen=True)
class Stream:
    """What the file says about a stream of indices apart from its bytes.

    Args:
        name: the tensor's name in ``state_dict()``.
        count: number of indices.
        codewords: number of allowed values; every index is below it.
    """

    name: str
    count: int
    codewords: int


class Codec(ABC):
    """Turn uint[n] indices into bytes and back.

    ``decode`` must check everything it reads: the bytes are hostile. It raises FormatError unless they are
    exactly what ``encode`` could have written for ``stream``.
    """

    id: ClassVar[str]
    general: ClassVar[bool] = True
    """Whether it can code any indices; False where the codec generates them itself."""
    max_codewords: ClassVar[int] = 1 << 20
    """The most codewords a stream may have."""

    @abstractmethod
    def encode(self, indices: NDArray[Any], stream: Stream) -> bytes:
        """Code ``indices`` (uint[stream.count], each below stream.codewords)."""

    @classmethod
    def of(cls, data: memoryview, stream: Stream) -> Codec:
        """Give the codec, settings included, that wrote ``data``."""
        return cls()

    @abstractmethod
    def decode(self, data: memoryview, stream: Stream) -> NDArray[Any]:
        """Give uint[stream.count] of ``index_dtype(stream.codewords)``."""

    def lookup(self, data: memoryview, stream: Stream, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Give ``values[decode(data)]``, float32[stream.count]; a codec may fuse the two."""
        return take(values, self.decode(data, stream), "clip")

    def generate(self, stream: Stream, positions: Any) -> Any:
        """Give the indices at ``positions``, int64 of numpy or torch, in their place; only where not ``general``."""
        raise UsageError(f"codec {self.id!r} generates no indices: those of {stream.name!r} are stored")

    @abstractmethod
    def code_lengths(self, histogram: NDArray[np.int64]) -> NDArray[np.float64]:
        """Give the bits each codeword costs when the counts are ``histogram`` (int64[codewords])."""

    @abstractmethod
    def max_count(self, size: int, codewords: int) -> int | None:
        """Bound the indices that ``size`` bytes can hold; None where no bound exists."""


def check_indices(indices: NDArray[Any], stream: Stream) -> None:
    """Raise FormatError, naming the first place, unless every index is below ``stream.codewords``."""
    if len(indices) and int(indices.max()) >= stream.codewords:
        where = int(np.argmax(indices >= stream.codewords))
        raise FormatError(
            f"indices of {stream.name!r}: index {indices[where]} at position {where}, "
            f"expected less than {stream.codewords} codewords"
        )
