"""BatchNorm statistics, estimated anew for weights that have changed."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

__all__ = ["estimate_batch_norm"]


def estimate_batch_norm(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Estimates the statistics of all BatchNorm layers anew, and leaves the model's training mode unchanged.

    Args:
        batches: (inputs, targets); the targets are not used.
    """
    update_bn(batches, model, next(model.parameters()).device)
