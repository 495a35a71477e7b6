"""Linear layers and convolutions that generate their weight a chunk of output channels at a time, in both passes."""

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

from compressor.formats.inference.generated import WEIGHTS_PER_CHUNK, Generated

__all__ = ["BLOCKWISE"]

Gradients = tuple[Tensor | None, Tensor | None]
"""The gradients of input and weight; None where not needed."""


class GeneratedWeight(Protocol):
    """A weight that never exists as a whole: a codebook, and the source of its indices."""

    @property
    def source(self) -> Generated:
        """The source of its indices."""

    @property
    def codebook(self) -> Tensor:
        """Its codewords, float[K], mirrored ones included."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype its weights are cast to."""


class ChannelChunk(NamedTuple):
    """Output channels that are computed together.

    Args:
        rows: these output channels.
        channels: the input channels they depend on; None for all.
        groups: the number of convolution groups that these are.
    """

    rows: range
    channels: range | None
    groups: int


@dataclass(frozen=True)
class Layer:
    """The operation of a layer, with its gradients.

    Args:
        operation: a function of (input, weight, bias, groups) that returns the output.
        gradients: a function of (input, weight, gradient of the output, groups, needed) that returns the gradients of
            input and weight; ``needed`` holds for each of them whether it is needed.
        axis: the axis of the channels of input and output.
        groups: the number of groups of the convolution; 1 for a linear layer.
        dtype: the dtype that weights are cast to for the operation.
    """

    operation: Callable[[Tensor, Tensor, Tensor | None, int], Tensor]
    gradients: Callable[[Tensor, Tensor, Tensor, int, tuple[bool, bool]], Gradients]
    axis: int
    groups: int
    dtype: torch.dtype

    def chunks(self, source: Generated) -> Iterator[ChannelChunk]:
        """Yields chunks of about ``WEIGHTS_PER_CHUNK`` weights at most, each of whole groups or within one group.

        Args:
            source: the weight, of shape [outputs, inputs / groups, ...].
        """
        outputs, inputs = source.shape[0] // self.groups, source.shape[1]  # of a group
        channels_per_chunk = max(1, WEIGHTS_PER_CHUNK // max(1, source.channel))
        if outputs <= channels_per_chunk:
            step = max(1, channels_per_chunk // max(1, outputs))
            for first in range(0, self.groups, step):
                last = min(first + step, self.groups)
                needed = None if last - first == self.groups else range(first * inputs, last * inputs)
                yield ChannelChunk(range(first * outputs, last * outputs), needed, last - first)
            return
        for group in range(self.groups):
            needed = None if self.groups == 1 else range(group * inputs, (group + 1) * inputs)
            for first in range(group * outputs, (group + 1) * outputs, channels_per_chunk):
                rows = range(first, min(first + channels_per_chunk, (group + 1) * outputs))
                yield ChannelChunk(rows, needed, 1)


class _Blockwise(Function):
    """Computes a layer chunk by chunk.

    Saves input, codebook and bias for the backward pass, which generates the weights again. With i(r) the index of
    weight r, the gradient of codeword k is the sum of the gradients of all weights r with i(r) = k.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, codebook: Tensor, bias: Tensor | None, source: Generated, layer: Layer) -> Tensor:
        ctx.save_for_backward(x, codebook, bias)
        ctx.source, ctx.layer = source, layer
        output = None
        for rows, channels, groups in layer.chunks(source):
            weight = source.rows(codebook, rows)[0].to(layer.dtype)
            chunk_bias = None if bias is None else _narrow(bias, rows, 0)
            chunk = layer.operation(_narrow(x, channels, layer.axis), weight, chunk_bias, groups)
            if len(rows) == source.shape[0]:
                return chunk
            if output is None:
                shape = list(chunk.shape)
                shape[layer.axis] = source.shape[0]
                output = chunk.new_empty(shape)
            _narrow(output, rows, layer.axis).copy_(chunk)
        assert output is not None
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, codebook, bias = ctx.saved_tensors
        source, layer, needed = ctx.source, ctx.layer, ctx.needs_input_grad
        x_gradient = torch.zeros_like(x) if needed[0] else None
        codebook_gradient = torch.zeros_like(codebook) if needed[1] else None
        for rows, channels, groups in layer.chunks(source) if any(needed[:2]) else ():
            weight, indices = source.rows(codebook, rows)
            inputs, outputs_gradient = _narrow(x, channels, layer.axis), _narrow(gradient, rows, layer.axis)
            chunk_gradients = layer.gradients(inputs, weight.to(layer.dtype), outputs_gradient, groups, needed[:2])
            if x_gradient is not None:
                _narrow(x_gradient, channels, layer.axis).add_(chunk_gradients[0])
            if codebook_gradient is not None and chunk_gradients[1] is not None:
                # index_add_ sums in order on a CPU; on a GPU only with torch.use_deterministic_algorithms(True)
                codebook_gradient.index_add_(0, indices, chunk_gradients[1].reshape(-1).to(codebook.dtype))
        bias_gradient = gradient.movedim(layer.axis, -1).reshape(-1, len(bias)).sum(0) if needed[2] else None
        return x_gradient, codebook_gradient, bias_gradient, None, None


def _narrow(tensor: Tensor, channels: range | None, axis: int) -> Tensor:
    """Returns a view of some channels of a tensor; the tensor itself for None."""
    return tensor if channels is None else tensor.narrow(axis, channels.start, len(channels))


def _compute(x: Tensor, weight: GeneratedWeight, bias: Tensor | None, layer: Callable[[torch.dtype], Layer]) -> Tensor:
    """Returns the output of a layer, computed in the dtype of autocast where that is enabled for the device."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return _apply(x, weight, bias, layer(weight.dtype))
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        return _apply(x.to(dtype), weight, None if bias is None else bias.to(dtype), layer(dtype))


def _apply(x: Tensor, weight: GeneratedWeight, bias: Tensor | None, layer: Layer) -> Tensor:
    output: Tensor = _Blockwise.apply(x, weight.codebook, bias, weight.source, layer)
    return output


def _linear(input: Tensor, weight: GeneratedWeight, bias: Tensor | None = None) -> Tensor:  # noqa: A002
    """Returns what ``torch.nn.functional.linear`` does, for a generated weight."""
    return _compute(input, weight, bias, partial(Layer, _apply_linear, _linear_gradients, -1, 1))


def _apply_linear(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    del groups
    return functional.linear(x, weight, bias)


def _linear_gradients(x: Tensor, weight: Tensor, gradient: Tensor, groups: int, needed: tuple[bool, bool]) -> Gradients:
    del groups
    flat = gradient.reshape(-1, gradient.shape[-1])
    return (
        gradient @ weight if needed[0] else None,
        flat.T @ x.reshape(-1, x.shape[-1]) if needed[1] else None,
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
    """Returns what ``convolve``, a function of ``torch.nn.functional``, does, for a generated weight."""

    def operation(x: Tensor, chunk: Tensor, chunk_bias: Tensor | None, chunk_groups: int) -> Tensor:
        return convolve(x, chunk, chunk_bias, stride, padding, dilation, chunk_groups)

    layer = partial(Layer, operation, partial(_conv_gradients, operation), 1 - len(weight.source.shape), groups)
    return _compute(input, weight, bias, layer)


def _conv_gradients(
    operation: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    gradient: Tensor,
    groups: int,
    needed: tuple[bool, bool],
) -> Gradients:
    """Computes a chunk again and differentiates it by autograd, which handles every padding and memory layout."""
    x, weight = x.detach().requires_grad_(needed[0]), weight.detach().requires_grad_(needed[1])
    with torch.enable_grad():
        output = operation(x, weight, None, groups)
    differentiated = [tensor for tensor in (x, weight) if tensor.requires_grad]
    gradients = iter(torch.autograd.grad(output, differentiated, gradient))
    return next(gradients) if needed[0] else None, next(gradients) if needed[1] else None


BLOCKWISE: Mapping[Any, Callable[..., Tensor]] = {
    functional.linear: _linear,
    **{convolve: partial(_conv, convolve) for convolve in (functional.conv1d, functional.conv2d, functional.conv3d)},
}
"""For each function of torch that takes a weight, the function that replaces it for generated weights."""
