"""Batches of a loader, which all of training and evaluation take as pairs of tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from compressor.formats.errors import UsageError

__all__ = ["Batches", "check_batch"]

Batches = Iterable[tuple[Tensor, Tensor]]
"""Pairs of inputs and targets."""

_MAX_LISTED = 5  # keys or parts of a batch that a message lists


def check_batch(batch: Any) -> None:
    """Checks that a batch is a pair of tensors, or of what is moved to a device as tensors are.

    Raises:
        UsageError: it is something else; the message says what.

    Example:
        >>> import torch
        >>> check_batch({"image": torch.zeros(2), "label": torch.zeros(2)})
        Traceback (most recent call last):
        ...
        compressor.formats.errors.UsageError: a batch must be a pair of tensors (inputs, targets), got dict of image \
Tensor, label Tensor: give the loader a collate_fn that returns the pair
    """
    if isinstance(batch, list | tuple) and len(batch) == 2 and all(hasattr(part, "to") for part in batch):
        return
    raise UsageError(
        f"a batch must be a pair of tensors (inputs, targets), got {_description(batch)}: give the loader a collate_fn "
        "that returns the pair"
    )


def _description(batch: Any) -> str:
    kind = type(batch).__name__
    if isinstance(batch, dict):
        parts = [f"{str(key)[:40]} {type(part).__name__}" for key, part in batch.items()]
    elif isinstance(batch, list | tuple):
        parts = [type(part).__name__ for part in batch]
    else:
        return f"a {kind}"
    more = f" and {len(parts) - _MAX_LISTED} more" if len(parts) > _MAX_LISTED else ""
    return f"{kind} of {', '.join(parts[:_MAX_LISTED]) or 'nothing'}{more}"
