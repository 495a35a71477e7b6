"""Curvature: what errors of the weights of one tensor cost, to second order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compressor.sharing.sites import Site

__all__ = ["Curvature", "LayerView", "diagonals"]


@dataclass(frozen=True)
class LayerView:
    """A weight tensor as matrices: one for each group of a convolution, of output rows and input columns.

    Args:
        shape: of the tensor.
        groups: G, which do not share inputs.
        inputs_first: whether input channels come before output channels, as in transposed convolutions.
        live: int64[d], ascending, the only columns that matter, which the matrices then have alone: what the others are
            multiplied by is zero. None: all.

    Example:
        >>> view = LayerView((6, 2, 3, 3), groups=2)
        >>> view.matrices(torch.zeros(6, 2, 3, 3)).shape
        torch.Size([2, 3, 18])
    """

    shape: tuple[int, ...]
    groups: int = 1
    inputs_first: bool = False
    live: Tensor | None = field(default=None, compare=False)

    @property
    def all_columns(self) -> int:
        """The number of columns, whether they matter or not."""
        inputs = self.shape[0] // self.groups if self.inputs_first else self.shape[1]
        return inputs * math.prod(self.shape[2:])

    @property
    def columns(self) -> int:
        """The number of columns of each matrix."""
        return self.all_columns if self.live is None else len(self.live)

    def matrices(self, tensor: Tensor) -> Tensor:
        """Returns a tensor of ``shape`` as [G, rows, columns]; columns are ordered by input channel, then position."""
        parts = tensor.reshape(self.groups, self.shape[0] // self.groups, *self.shape[1:])
        if self.inputs_first:
            parts = parts.transpose(1, 2)
        return self.live_of(parts.reshape(self.groups, parts.shape[1], -1))

    def live_of(self, columns: Tensor) -> Tensor:
        """Returns those that matter of [..., all columns]."""
        return columns if self.live is None else columns[..., self.live]

    def tensor(self, matrices: Tensor) -> Tensor:
        """Returns matrices [G, rows, columns] as a tensor of ``shape``, zero where columns do not matter."""
        if self.live is not None:
            whole = matrices.new_zeros(*matrices.shape[:2], self.all_columns)
            matrices = whole.index_copy_(2, self.live, matrices)
        if not self.inputs_first:
            return matrices.reshape(self.shape)
        inputs, outputs = self.shape[0] // self.groups, self.shape[1]
        parts = matrices.reshape(self.groups, outputs, inputs, *self.shape[2:])
        return parts.transpose(1, 2).reshape(self.shape)


@dataclass(frozen=True)
class Curvature:
    """The second-order loss of errors of one tensor.

    An error E of the matrix of a layer, [rows, columns], adds ``1/2 sum_o g_o E_o H E_o^T`` to the loss of an image,
    where H is the second moment of the inputs and g_o the mean squared gradient of an output, for labels as the model's
    own answers have them: the true Fisher information, under the assumption that both are independent.

    Args:
        diagonal: float32[shape], ``g_o H_jj``, or the mean squared gradient where nothing better is known.
        view: how the tensor is a matrix; None: only the diagonal is known.
        moments: H of consecutive ranges of columns, float[G, d, d] each, whose d sum up to the columns: one range, but
            for very wide layers.
        target: float32[shape], the weights that errors are measured from: those by which the layer answers the inputs
            that the layers compressed before it give as it answered the inputs of the dense model. None: its own.

    Reference: Hassibi, Stork, "Second Order Derivatives for Network Pruning", NIPS 1992; Martens, Grosse, "Optimizing
    Neural Networks with Kronecker-factored Approximate Curvature", ICML 2015, for the factors.
    """

    diagonal: Tensor
    view: LayerView | None = None
    moments: Sequence[Tensor] = ()
    target: Tensor | None = None

    @property
    def mean(self) -> float:
        """The mean of the diagonal."""
        return float(self.diagonal.double().mean())

    def loss(self, errors: Tensor) -> float:
        """Returns the loss of one image that errors of the weights, float[shape], are predicted to add."""
        if self.view is None or not self.moments:
            return float((self.diagonal.double() * errors.double().square()).sum()) / 2
        rows = self.view.matrices(self.diagonal.double()).sum(dim=2)
        inputs = sum(moment.double().diagonal(dim1=1, dim2=2).sum(dim=1) for moment in self.moments)
        gradients = rows / torch.as_tensor(inputs).clamp(min=torch.finfo(torch.float64).tiny)[:, None]
        matrices, total, start = self.view.matrices(errors), 0.0, 0
        for moment in self.moments:
            part = matrices[..., start : start + moment.shape[-1]].to(moment.dtype)
            total += float((((part @ moment) * part).sum(dim=2).double() * gradients).sum())
            start += moment.shape[-1]
        return total / 2


def diagonals(curvature: Mapping[Site, Curvature] | None) -> dict[Site, Tensor] | None:
    """Returns the diagonal of each tensor, the importance of its squared errors; None where nothing was measured."""
    return None if curvature is None else {site: one.diagonal for site, one in curvature.items()}
