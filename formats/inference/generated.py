"""Weights whose indices a codec generates: a run of them at a time, or all, differentiable in the codebook."""

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

__all__ = ["BLOCK", "Generated"]

CHUNK = 1 << 15  # indices generated at a time, so that their 64-bit words stay in cache
BLOCK = 1 << 19  # weights that exist at a time, unless one output channel has more


@dataclass(frozen=True)
class Generated:
    """Where the weights of a tensor come from: ``codebook[codec.generate(position)]``.

    Args:
        codec: one that generates its indices.
        stream: name, weights and codewords of the tensor, mirrored codewords counted.
        shape: of the tensor.
        dtype: what its weights are rounded to, as the decoder does.

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
        """Give the indices of a run of positions: int32[stop - start]."""
        found = torch.empty(stop - start, dtype=torch.int32, device=device)
        for begin in range(start, stop, CHUNK):
            end = min(begin + CHUNK, stop)
            found[begin - start : end - start] = self._generate(begin, end, device)
        return found

    def _generate(self, start: int, stop: int, device: torch.device) -> Tensor:
        if device.type == "cpu":  # numpy is a third faster there
            return torch.from_numpy(self.codec.generate(self.stream, np.arange(start, stop, dtype=np.int64)))
        found: Tensor = self.codec.generate(self.stream, torch.arange(start, stop, device=device))
        return found

    @property
    def channel(self) -> int:
        """How many weights an entry of the first axis has."""
        return math.prod(self.shape[1:])

    def rows(self, codebook: Tensor, rows: range) -> tuple[Tensor, Tensor]:
        """Give some entries of the first axis, [rows, ...] in the tensor's dtype, and their indices, flat."""
        found = self.indices(rows.start * self.channel, rows.stop * self.channel, codebook.device)
        weights = codebook.index_select(0, found).to(self.dtype)
        return weights.view(len(rows), *self.shape[1:]), found

    def runs(self) -> Iterator[tuple[int, int]]:
        """Cut all positions into runs of ``BLOCK``."""
        count = self.stream.count
        return ((start, min(start + BLOCK, count)) for start in range(0, count, BLOCK))

    def expand(self, codebook: Tensor) -> Tensor:
        """Give all weights, differentiable in the codebook; the backward pass generates the indices anew."""
        whole: Tensor = _Expand.apply(codebook, self)
        return whole


class _Expand(Function):
    @staticmethod
    def forward(ctx: Any, codebook: Tensor, source: Generated) -> Tensor:
        ctx.source, ctx.codewords, ctx.dtype = source, len(codebook), codebook.dtype
        whole = codebook.new_empty(source.stream.count, dtype=source.dtype)
        for start, stop in source.runs():
            whole[start:stop] = codebook.index_select(0, source.indices(start, stop, codebook.device))
        return whole.view(source.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        flat = gradient.reshape(-1)
        total = torch.zeros(ctx.codewords, dtype=ctx.dtype, device=flat.device)
        for start, stop in ctx.source.runs():
            total.index_add_(0, ctx.source.indices(start, stop, flat.device), flat[start:stop].to(ctx.dtype))
        return total, None
