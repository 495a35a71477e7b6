"""Linear layers and convolutions whose weight exists a block of output channels at a time, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from compressor.formats.inference.generated import BLOCK, Generated

__all__ = ["BLOCKWISE"]

Pair = tuple[Tensor | None, Tensor | None]


class GeneratedWeight(Protocol):
    """A weight that does not exist as a whole: its codebook, and what generates its indices."""

    @property
    def source(self) -> Generated:
        """What generates its indices."""

    @property
    def codebook(self) -> Tensor:
        """Its codewords, float[K], mirrored ones included."""

    @property
    def dtype(self) -> torch.dtype:
        """What weights are cast to."""


class Block(NamedTuple):
    """Output channels computed together, the input channels they need, None for all, and the groups these are."""

    rows: range
    channels: range | None
    groups: int


@dataclass(frozen=True)
class Layer:
    """What is computed with a weight.

    Args:
        operation: of (input, weight, bias, groups).
        gradients: of (input, weight, gradient of the output, groups, which are wanted): those of input and weight.
        axis: along which channels of input and output lie.
        groups: that channels are parted into.
        dtype: that weights are cast to when they are used.
    """

    operation: Callable[[Tensor, Tensor, Tensor | None, int], Tensor]
    gradients: Callable[[Tensor, Tensor, Tensor, int, tuple[bool, bool]], Pair]
    axis: int
    groups: int
    dtype: torch.dtype

    def blocks(self, source: Generated) -> Iterator[Block]:
        """Cut the output channels into blocks of about ``BLOCK`` weights: runs of whole groups, or parts of one."""
        outputs, inputs = source.shape[0] // self.groups, source.shape[1]
        at_a_time = max(1, BLOCK // max(1, source.channel))
        if outputs <= at_a_time:
            step = max(1, at_a_time // max(1, outputs))
            for first in range(0, self.groups, step):
                last = min(first + step, self.groups)
                needs = None if last - first == self.groups else range(first * inputs, last * inputs)
                yield Block(range(first * outputs, last * outputs), needs, last - first)
            return
        for group in range(self.groups):
            needs = None if self.groups == 1 else range(group * inputs, (group + 1) * inputs)
            for first in range(group * outputs, (group + 1) * outputs, at_a_time):
                yield Block(range(first, min(first + at_a_time, (group + 1) * outputs)), needs, 1)


class _Blockwise(Function):
    """Saves input, codebook and bias for the backward pass, which generates the weights anew."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codebook: Tensor, bias: Tensor | None, source: Generated, layer: Layer) -> Tensor:
        ctx.save_for_backward(x, codebook, bias)
        ctx.source, ctx.layer = source, layer
        output = None
        for rows, channels, groups in layer.blocks(source):
            weight = source.rows(codebook, rows)[0].to(layer.dtype)
            part_of_bias = None if bias is None else _part(bias, rows, 0)
            part = layer.operation(_part(x, channels, layer.axis), weight, part_of_bias, groups)
            if len(rows) == source.shape[0]:
                return part
            if output is None:
                shape = list(part.shape)
                shape[layer.axis] = source.shape[0]
                output = part.new_empty(shape)
            _part(output, rows, layer.axis).copy_(part)
        assert output is not None
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, codebook, bias = ctx.saved_tensors
        source, layer, wanted = ctx.source, ctx.layer, ctx.needs_input_grad
        to_x = torch.zeros_like(x) if wanted[0] else None
        to_codebook = torch.zeros_like(codebook) if wanted[1] else None
        for rows, channels, groups in layer.blocks(source) if any(wanted[:2]) else ():
            weight, indices = source.rows(codebook, rows)
            given = _part(x, channels, layer.axis), weight.to(layer.dtype), _part(gradient, rows, layer.axis)
            of_x, of_weight = layer.gradients(*given, groups, wanted[:2])
            if to_x is not None:
                _part(to_x, channels, layer.axis).add_(of_x)
            if to_codebook is not None and of_weight is not None:
                # index_add_ sums in order on a CPU; on a GPU that takes torch.use_deterministic_algorithms(True)
                to_codebook.index_add_(0, indices, of_weight.reshape(-1).to(codebook.dtype))
        to_bias = gradient.movedim(layer.axis, -1).reshape(-1, len(bias)).sum(0) if wanted[2] else None
        return to_x, to_codebook, to_bias, None, None


def _part(tensor: Tensor, channels: range | None, axis: int) -> Tensor:
    return tensor if channels is None else tensor.narrow(axis, channels.start, len(channels))


def _compute(x: Tensor, weight: GeneratedWeight, bias: Tensor | None, layer: Callable[[torch.dtype], Layer]) -> Tensor:
    """Apply a layer in the dtype that autocast, where it is on, chooses."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return _apply(x, weight, bias, layer(weight.dtype))
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        return _apply(x.to(dtype), weight, None if bias is None else bias.to(dtype), layer(dtype))


def _apply(x: Tensor, weight: GeneratedWeight, bias: Tensor | None, layer: Layer) -> Tensor:
    computed: Tensor = _Blockwise.apply(x, weight.codebook, bias, weight.source, layer)
    return computed


def _linear(input: Tensor, weight: GeneratedWeight, bias: Tensor | None = None) -> Tensor:  # noqa: A002
    return _compute(input, weight, bias, partial(Layer, _apply_linear, _linear_gradients, -1, 1))


def _apply_linear(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    del groups
    return functional.linear(x, weight, bias)


def _linear_gradients(x: Tensor, weight: Tensor, gradient: Tensor, groups: int, wanted: tuple[bool, bool]) -> Pair:
    del groups
    flat = gradient.reshape(-1, gradient.shape[-1])
    return (
        gradient @ weight if wanted[0] else None,
        flat.T @ x.reshape(-1, x.shape[-1]) if wanted[1] else None,
    )


def _conv(
    convolve: Callable[..., Tensor],
    input: Tensor,  # noqa: A002
    weight: GeneratedWeight,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    def operation(x: Tensor, block: Tensor, part_of_bias: Tensor | None, parted: int) -> Tensor:
        return convolve(x, block, part_of_bias, stride, padding, dilation, parted)

    layer = partial(Layer, operation, partial(_conv_gradients, operation), 1 - len(weight.source.shape), groups)
    return _compute(input, weight, bias, layer)


def _conv_gradients(
    operation: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    gradient: Tensor,
    groups: int,
    wanted: tuple[bool, bool],
) -> Pair:
    """Run a block once more and differentiate it: any padding and layout is autograd's own affair."""
    x, weight = x.detach().requires_grad_(wanted[0]), weight.detach().requires_grad_(wanted[1])
    with torch.enable_grad():
        output = operation(x, weight, None, groups)
    found = iter(torch.autograd.grad(output, [one for one in (x, weight) if one.requires_grad], gradient))
    return next(found) if wanted[0] else None, next(found) if wanted[1] else None


BLOCKWISE: Mapping[Any, Callable[..., Tensor]] = {
    functional.linear: _linear,
    **{convolve: partial(_conv, convolve) for convolve in (functional.conv1d, functional.conv2d, functional.conv3d)},
}
"""What computes with a virtual weight, by the function of torch that it stands for."""
