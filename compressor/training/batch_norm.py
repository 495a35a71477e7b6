"""BatchNorm statistics, estimated anew for weights that have changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from compressor.data.batches import check_batch

__all__ = ["estimate_batch_norm"]


def estimate_batch_norm(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Estimates the statistics of all BatchNorm layers anew, and leaves the model's training mode unchanged.

    Args:
        batches: (inputs, targets); the targets are not used.

    Raises:
        UsageError: a batch is neither a tensor nor a pair of them.
    """
    update_bn(map(_checked, batches), model, next(model.parameters()).device)


def _checked(batch: Any) -> Any:
    if not isinstance(batch, Tensor | list | tuple):  # of a list or tuple torch takes the first part
        check_batch(batch)
    return batch
