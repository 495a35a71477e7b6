"""Whether the gradient that a backward pass is given is its own, to write to."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from compressor.workspace import workspace

__all__ = ["own"]


def own(gradient: Tensor) -> Tensor:
    """Give the gradient itself, contiguous, where nobody else refers to it or its memory; else a copy.

    To be called by the backward pass of a function that is ``once_differentiable``, with its argument as it came. Of
    large weights the gradient is most often nobody else's: the layer has just computed it. PyTorch asks the same before
    it makes a gradient a parameter's ``.grad``.

    Example:
        >>> kept = torch.ones(3)
        >>> own(kept) is kept
        False
    """
    if gradient.is_contiguous() and _references(gradient) == _references_of_owner():
        return gradient
    copy = workspace(gradient.shape, gradient.dtype, gradient.device)
    return copy.copy_(gradient)


def _references(gradient: Tensor) -> tuple[int, ...] | None:
    """Count who refers to the Python object, the tensor behind it, and its memory; None where PyTorch does not tell."""
    try:
        memory = torch._C._storage_Use_Count(gradient.untyped_storage()._cdata)
        return sys.getrefcount(gradient), gradient._use_count(), memory  # type: ignore[attr-defined]  # torch 2.14 has it
    except (AttributeError, RuntimeError):  # another version's; or a tensor without memory
        return None


class _Trial(Function):
    @staticmethod
    def forward(ctx: Any, one: Tensor, found: list[tuple[int, ...] | None]) -> Tensor:
        ctx.found = found
        return one.view_as(one)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.found.append(_as_own(gradient))
        return gradient, None


def _as_own(gradient: Tensor) -> tuple[int, ...] | None:
    return _references(gradient)  # called like this for as many references as ``own`` itself makes


@functools.cache
def _references_of_owner() -> tuple[int, ...]:
    """Find out what ``_references`` are where there is nobody else: versions of Python and PyTorch differ in it."""
    found: list[tuple[int, ...] | None] = []
    with torch.enable_grad():
        one = torch.ones(1, dtype=torch.float32, device="cpu", requires_grad=True)
        torch.autograd.grad((_Trial.apply(one, found) * 2.0).sum() * 3.0, one)
    return found[0] or ()
