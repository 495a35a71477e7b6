"""BatchNorm statistics, estimated anew for weights that have changed."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

__all__ = ["estimate_batch_norm"]


def estimate_batch_norm(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Estimates the BatchNorm statistics with the weights as they are now, and leaves the model's mode as it was."""
    update_bn(batches, model, next(model.parameters()).device)
