"""A codebook as a group keeps it: in units of the weights' spread, in any order."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

__all__ = ["CodebookScale", "scaled_codebook"]


class CodebookScale(NamedTuple):
    """How codewords follow from the values a group keeps, and how gradients go back to those values.

    Args:
        unit: what the values are multiplied by.
        factor: what their gradients are multiplied by besides.
        rows: the number of equally long rows the codebook is cut into, each of which ascends; 0: none, the codewords
            stay in the order of the values.
    """

    unit: float = 1.0
    factor: float = 1.0
    rows: int = 0

    def codebook(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the codebook, float32[K] or [rows, K / rows], and for rows the position of each codeword's value."""
        codebook = values * self.unit
        if not self.rows:
            return codebook, None
        ascending, order = codebook.view(self.rows, -1).sort()
        return ascending, order

    def gradient(self, to_codebook: Tensor, order: Tensor | None) -> Tensor:
        """Returns the gradient of the values, float32[K], from that of the codebook in any shape."""
        scaled = to_codebook * (self.unit * self.factor)
        if order is None:
            return scaled
        return torch.empty_like(order, dtype=scaled.dtype).scatter_(1, order, scaled.view_as(order)).view(-1)


class _ScaledCodebook(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: CodebookScale) -> Tensor:
        codebook, ctx.order = scale.codebook(values)
        ctx.scale = scale
        return codebook

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.scale.gradient(gradient, ctx.order), None


def scaled_codebook(values: Tensor, scale: CodebookScale) -> Tensor:
    """Returns the codebook of these values, differentiable.

    Example:
        >>> scaled_codebook(torch.tensor([0.5, -1.0]), CodebookScale(2.0, rows=1)).tolist()
        [[-2.0, 1.0]]
    """
    codebook: Tensor = _ScaledCodebook.apply(values, scale) if values.requires_grad else scale.codebook(values)[0]
    return codebook
