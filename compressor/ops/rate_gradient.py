"""The gradient of a code length: what moving a weight between two levels of a grid changes of the bits it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from compressor.formats.jit.cache import compiled_kernel
from compressor.ops.parallel import Sliced, cache_chunks, on_processor, parallel_for, thread_slices

if TYPE_CHECKING:
    from compressor.formats.jit.builder import Code

__all__ = ["rate_gradient", "with_rate_gradient"]

MOST_SLOPES = 1 << 20  # more than any grid has


def rate_gradient(weights: Tensor, slopes: Tensor, line: Tensor, out: Tensor) -> None:
    """Writes the slope between the two levels that each weight lies between; beyond the ends, that of the last two.

    With ``line`` (a, b), level k of the grid is ``(b + k) / a``; a weight of exactly a level has the slope above it.

    Args:
        weights: float[shape].
        slopes: float32[K - 1], of the code length between each level and the next.
        line: float32[2].
        out: of the shape and dtype of ``weights``, contiguous.

    Example:
        >>> out, line = torch.empty(4), torch.tensor([1.0, -1.0])
        >>> rate_gradient(torch.tensor([-3.0, -0.2, 0.2, 3.0]), torch.tensor([-5.0, 7.0]), line, out)
        >>> out.tolist()
        [-5.0, -5.0, 7.0, 7.0]
    """
    kernel = compiled_kernel(_write_slopes, vectorise=True) if on_processor(weights) and on_processor(out) else None
    if kernel is not None:
        slices = thread_slices(out.numel())
        last = [len(slopes) - 1] * len(slices)
        parallel_for(kernel, slices, [Sliced(weights.contiguous()), slopes.contiguous(), line, Sliced(out), last])
        return
    flat, result = weights.reshape(-1), out.view(-1)
    for chunk in cache_chunks(flat):
        places = (flat[chunk].float() * line[0] - line[1]).nan_to_num_(0.0).clamp_(0, len(slopes) - 1)
        result[chunk] = slopes.index_select(0, places.int()).to(out.dtype)


def _write_slopes(code: Code) -> None:
    """Builds the kernel of ``rate_gradient``."""
    weights, slopes, line, out = (code.array(position, 32) for position in range(4))
    last, count, place = code.number(4), code.number(5), code.variable(0)
    with code.loop(lambda: place.get() < count):
        cell = (weights.real(place.get()) * line.real(0) - line.real(1)).whole(MOST_SLOPES)
        out[place.get()] = slopes[(cell < last).choose(cell, last)]
        place.set(place.get() + 1)
    code.give(0)


class _WithRateGradient(Function):
    @staticmethod
    def forward(ctx: Any, master: Tensor, cost: Tensor, slopes: Tensor, line: Tensor) -> Tensor:
        ctx.save_for_backward(master, slopes, line)
        return cost.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        master, slopes, line = ctx.saved_tensors
        out = torch.empty_like(master, memory_format=torch.contiguous_format)
        rate_gradient(master, slopes * gradient, line, out)
        return out, None, None, None


def with_rate_gradient(master: Tensor, cost: Tensor, slopes: Tensor, line: Tensor) -> Tensor:
    """Returns the cost of coding weights, whose gradient is the slope of the code length at each.

    Args:
        master: float[shape], the weights before they are rounded to a grid, see ``rate_gradient``.
        cost: scalar, what all indices cost together.
        slopes: float32[K - 1], what a unit of weight costs between each level and the next.
        line: of the grid.

    Example:
        >>> master = torch.tensor([0.4, -1.6], requires_grad=True)
        >>> slopes, line = torch.tensor([-2.0, -1.0, 1.0, 2.0]), torch.tensor([1.0, -2.0])
        >>> with_rate_gradient(master, torch.tensor(3.0), slopes, line).backward()
        >>> master.grad.tolist()
        [1.0, -2.0]
    """
    result: Tensor = _WithRateGradient.apply(master, cost, slopes, line)
    return result
