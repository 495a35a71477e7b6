"""Whether the gradient that a backward pass is given is its own, to write to."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from compressor.ops.buffer_pool import workspace

__all__ = ["own"]


def own(gradient: Tensor, companion: Tensor) -> Tensor:
    """Give the gradient itself, contiguous, where nobody else refers to it or its memory; else a copy.

    Of large weights the gradient is most often nobody else's: the layer has just computed it. PyTorch asks the same
    before it makes a gradient a parameter's ``.grad``.

    Args:
        gradient: as the backward pass of an autograd function was given it.
        companion: likewise, of an output that nobody has used: autograd has made it for this call alone. As many
            references as this has are the backward pass's own, whatever the version of Python and PyTorch.

    Example:
        >>> kept, also_kept = torch.ones(3), []
        >>> also_kept.append(kept)
        >>> own(kept, torch.ones(3)) is kept
        False
    """
    references = _references(gradient)
    if gradient.is_contiguous() and references and references == _references(companion):
        return gradient
    copy = workspace(gradient.shape, gradient.dtype, gradient.device)
    return copy.copy_(gradient)


def _references(gradient: Tensor) -> tuple[int, ...]:
    """Count who refers to the Python object, the tensor, and its memory; empty where PyTorch does not tell."""
    try:
        memory = torch._C._storage_Use_Count(gradient.untyped_storage()._cdata)
        return sys.getrefcount(gradient), gradient._use_count(), memory  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):  # another version's; or a tensor without memory
        return ()
