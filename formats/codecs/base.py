"""The interface of codecs, which store the indices of one tensor as bytes.

A codec is one file in ``codecs/``, or in another package: a frozen dataclass, constructible with no arguments,
registered by ``registry.register``. Nothing else is edited; the contract tests find it in ``registry.CODECS``.
Whatever a decoder needs besides the ``Stream`` below is in the bytes themselves.
"""

from __future__ import annotations

import math
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
    """What the metadata says of an index stream, whatever the codec.

    Args:
        name: the name of the tensor in ``state_dict()``.
        count: the number n of indices.
        codewords: the number K of codewords; every index is below it.
        shape: the shape of the indices, whose sizes multiply to n; by default they are in one row.

    Example:
        >>> Stream("conv.weight", 288, 16, (8, 4, 3, 3)).axes
        (8, 4, 9)
    """

    name: str
    count: int
    codewords: int
    shape: tuple[int, ...] = ()

    @property
    def axes(self) -> tuple[int, int, int]:
        """The shape as rows, columns and positions: the first size, the second, and the product of the others."""
        rows, columns = self.shape[:2] if len(self.shape) > 1 else (1, self.count)
        return rows, columns, math.prod(self.shape[2:])


class Codec(ABC):
    """Encodes uint[n] indices as bytes and decodes them.

    ``decode`` must check everything it reads, since the bytes may be hostile: it raises FormatError unless they are
    exactly what ``encode`` could have written for ``stream``.
    """

    id: ClassVar[str]
    """The name of the codec in files."""

    general: ClassVar[bool] = True
    """Whether it can code any indices; False for a codec that generates the indices itself."""

    places: ClassVar[bool] = False
    """Whether it makes use of where an index stands, so that indices may take fewer bits than ``code_lengths`` says."""

    max_codewords: ClassVar[int] = 1 << 20
    """The largest K of a stream."""

    @abstractmethod
    def encode(self, indices: NDArray[Any], stream: Stream) -> bytes:
        """Returns ``indices`` (uint[n], each below K) as bytes."""

    @classmethod
    def of(cls, data: memoryview, stream: Stream) -> Codec:
        """Returns the codec that wrote ``data``, with its settings; the default settings where there are none."""
        return cls()

    @abstractmethod
    def decode(self, data: memoryview, stream: Stream) -> NDArray[Any]:
        """Returns the indices, uint[n] of ``index_dtype(K)``.

        Raises:
            FormatError: ``encode`` could not have written ``data``.
        """

    def lookup(self, data: memoryview, stream: Stream, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns ``values[decode(data, stream)]``, float32[n]; codecs may compute both in one pass.

        Args:
            data: the stream.
            stream: its description.
            values: float32[K], the value of each codeword.

        Raises:
            FormatError: as ``decode``.
        """
        return take(values, self.decode(data, stream), "clip")

    def generate(self, stream: Stream, positions: Any) -> Any:
        """Replaces positions by their indices; only for codecs that are not ``general``.

        Args:
            stream: the description of the stream.
            positions: int64, a numpy array or a torch tensor, overwritten in place.

        Returns:
            ``positions``, which now holds indices.

        Raises:
            UsageError: the codec stores its indices.
        """
        raise UsageError(f"codec {self.id!r} generates no indices: those of {stream.name!r} are stored")

    @abstractmethod
    def code_lengths(self, histogram: NDArray[np.int64]) -> NDArray[np.float64]:
        """Returns the length of each codeword's code in bits, float64[K].

        Args:
            histogram: int64[K], how often each codeword occurs.
        """

    @abstractmethod
    def max_count(self, size: int, codewords: int) -> int | None:
        """Returns the most indices that ``size`` bytes can hold with K ``codewords``; None where there is no bound."""


def check_indices(indices: NDArray[Any], stream: Stream) -> None:
    """Checks that every index is below K.

    Raises:
        FormatError: one is not; the message names the first such position.
    """
    if len(indices) and int(indices.max()) >= stream.codewords:
        where = int(np.argmax(indices >= stream.codewords))
        raise FormatError(
            f"indices of {stream.name!r}: index {indices[where]} at position {where}, "
            f"expected less than {stream.codewords} codewords"
        )
