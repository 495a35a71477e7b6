"""Weights whose indices a codec generates, some rows or all at a time, differentiable in the codebook."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from compressor.formats.codecs.base import Codec, Stream

__all__ = ["WEIGHTS_PER_CHUNK", "Generated"]

WEIGHTS_PER_CHUNK = 1 << 19
"""The most weights that exist at a time, unless a single output channel has more."""

_INDICES_PER_CHUNK = 1 << 15  # indices generated at a time, so that their 64-bit words stay in the cache


@dataclass(frozen=True)
class Generated:
    """A tensor whose weights are ``codebook[codec.generate(position)]``.

    Args:
        codec: a codec that generates indices, not a ``general`` one.
        stream: the name of the tensor, its number of weights, and its number of codewords, mirrored ones counted.
        shape: the shape of the tensor.
        dtype: the dtype its weights are rounded to.

    Example:
        >>> from compressor.formats.codecs.registry import codec_class
        >>> source = Generated(codec_class("hashed")(), Stream("fc.weight", 6, 100), (2, 3), torch.float32)
        >>> source.indices(2, 6, torch.device("cpu")).tolist()
        [66, 25, 57, 27]
    """

    codec: Codec
    stream: Stream
    shape: tuple[int, ...]
    dtype: torch.dtype

    def indices(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Returns the indices of the positions from ``start`` to ``stop``, int32[stop - start] on ``device``."""
        indices = torch.empty(stop - start, dtype=torch.int32, device=device)
        for begin in range(start, stop, _INDICES_PER_CHUNK):
            end = min(begin + _INDICES_PER_CHUNK, stop)
            indices[begin - start : end - start] = self._generate(begin, end, device)
        return indices

    def _generate(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Returns the indices of some positions, int64 on ``device``."""
        if device.type == "cpu":  # where numpy is a third faster than torch
            return torch.from_numpy(self.codec.generate(self.stream, np.arange(start, stop, dtype=np.int64)))
        indices: Tensor = self.codec.generate(self.stream, torch.arange(start, stop, device=device))
        return indices

    @property
    def channel(self) -> int:
        """The number of weights in an output channel, a slice of the first axis."""
        return math.prod(self.shape[1:])

    def rows(self, codebook: Tensor, rows: range) -> tuple[Tensor, Tensor]:
        """Returns the weights of some output channels, and their indices.

        Args:
            codebook: float[K], mirrored codewords included.
            rows: consecutive positions of the first axis.

        Returns:
            The weights, [len(rows), ...] of the tensor's dtype, and int32[len(rows) * channel].
        """
        indices = self.indices(rows.start * self.channel, rows.stop * self.channel, codebook.device)
        weights = codebook.index_select(0, indices).to(self.dtype)
        return weights.view(len(rows), *self.shape[1:]), indices

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Yields start and stop of chunks of at most ``WEIGHTS_PER_CHUNK`` positions, which cover the tensor."""
        count = self.stream.count
        return ((start, min(start + WEIGHTS_PER_CHUNK, count)) for start in range(0, count, WEIGHTS_PER_CHUNK))

    def expand(self, codebook: Tensor) -> Tensor:
        """Returns all weights, differentiable in the codebook; the backward pass generates the indices again.

        Args:
            codebook: float[K], mirrored codewords included.
        """
        weights: Tensor = _Expand.apply(codebook, self)
        return weights


class _Expand(Function):
    """Looks up all weights a chunk at a time; the gradient of a codeword is the sum of those of its weights."""

    @staticmethod
    def forward(ctx: Any, codebook: Tensor, source: Generated) -> Tensor:
        ctx.source, ctx.codewords, ctx.dtype = source, len(codebook), codebook.dtype
        weights = codebook.new_empty(source.stream.count, dtype=source.dtype)
        for start, stop in source.chunks():
            weights[start:stop] = codebook.index_select(0, source.indices(start, stop, codebook.device))
        return weights.view(source.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        flat = gradient.reshape(-1)
        total = torch.zeros(ctx.codewords, dtype=ctx.dtype, device=flat.device)
        for start, stop in ctx.source.chunks():
            total.index_add_(0, ctx.source.indices(start, stop, flat.device), flat[start:stop].to(ctx.dtype))
        return total, None
