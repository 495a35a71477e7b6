"""Mixed precision: autocast for the forward passes, and for float16 a scaled loss."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from compressor.distributed.devices import half_precision

__all__ = ["MixedPrecision"]


class MixedPrecision:
    """What a training computes in, on its device.

    Args:
        device: that the model is on.
        enabled: bfloat16, or float16 where the device does not know it; else everything is computed as it is.

    Attributes:
        scaler: of the loss, for float16 alone, where small gradients would become 0; its scale is part of a checkpoint.
    """

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self.device = device
        self._dtype = half_precision(device) if enabled else None
        scaled = self._dtype == torch.float16 and device.type != "mps"  # its scale would be a float64, unknown there
        self.scaler = GradScaler(device.type) if scaled else None

    def autocast(self, cache_enabled: bool = True) -> AbstractContextManager[Any]:
        """Returns the context in which forward passes run.

        Args:
            cache_enabled: whether a weight's copy in half precision is kept until the context ends: only where the
                weights do not change inside.
        """
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self._dtype, cache_enabled=cache_enabled)

    def full(self, output: Any) -> Any:
        """Returns a model's output, a tensor or a tuple, list or dictionary of them, in float32 for the loss."""
        if self._dtype is None:
            return output
        if isinstance(output, Tensor):
            return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output
        if isinstance(output, dict):
            return type(output)({name: self.full(part) for name, part in output.items()})
        if isinstance(output, tuple) and hasattr(output, "_fields"):
            return type(output)(*map(self.full, output))
        return type(output)(map(self.full, output)) if isinstance(output, tuple | list) else output

    def backward(self, loss: Tensor) -> None:
        """Computes the gradients of a loss, scaled where there is a scaler."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def step(self, optimizer: Optimizer) -> None:
        """Makes an optimiser take its step; a scaler skips it, and lowers its scale, where gradients overflowed."""
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()
