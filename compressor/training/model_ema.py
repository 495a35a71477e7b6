"""The average of a training's last weights, which is often better than the last of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from compressor.distributed.replicas import RUNNING_STATISTICS

__all__ = ["ModelEma"]


class ModelEma:
    """An exponential moving average of weights, codebooks and BatchNorm statistics; timm's ``--model-ema``.

    Its memory grows with the steps, as timm's ``--model-ema-warmup`` has it, so that what the training began with is
    forgotten in a short one too. Indices that a scheme keeps are the last ones: they have no average. A tensor that
    changes its shape, as the codebook of a scheme with rounds may, begins anew.

    Args:
        model: in training.
        decay: the most that is kept at a step, 0 to 1.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = layer.weight.fill_(1.0)
        ...     average = ModelEma(layer, 0.5)
        ...     _ = layer.weight.fill_(2.0)
        >>> for _ in range(2):
        ...     average.update()
        >>> with average.in_place():
        ...     round(layer.weight.item(), 3)
        1.815
        >>> layer.weight.item()
        2.0

    Reference: Polyak, Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992; the warm-up: timm's.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._decay, self._steps = model, decay, 0
        self._means = {name: _exact(tensor) for name, tensor in self._trained()}

    def _trained(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, parameter) for name, parameter in self._model.named_parameters() if parameter.requires_grad)
        yield from ((name, buffer) for name, buffer in self._model.named_buffers() if name.endswith(RUNNING_STATISTICS))

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model as it is, after a step."""
        self._steps += 1
        kept = min(self._decay, 1 - (1 + self._steps) ** (-2 / 3))
        means, current = [], []
        for name, tensor in self._trained():
            mean = self._means.get(name)
            if mean is None or mean.shape != tensor.shape:
                self._means[name] = _exact(tensor)
            else:
                means.append(mean)
                current.append(tensor.detach().to(mean.dtype))
        if means:  # torch does not know how to average nothing
            get_ema_multi_avg_fn(kept)(means, current, None)

    @torch.no_grad()
    def put(self) -> None:
        """Give the model the average's values."""
        for name, tensor in self._trained():
            tensor.copy_(self._means[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model be the average inside."""
        last = {name: tensor.detach().clone() for name, tensor in self._trained()}
        self.put()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in self._trained():
                    tensor.copy_(last[name])

    def state_dict(self) -> dict[str, Any]:
        """Give the average, and of how many steps."""
        return {"means": dict(self._means), "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put it back."""
        devices = {name: tensor.device for name, tensor in self._trained()}
        self._means = {name: mean.to(devices[name], copy=True) for name, mean in state["means"].items()}
        self._steps = state["steps"]


def _exact(tensor: Tensor) -> Tensor:
    """Copy a tensor, to float32 at least: in half precision what a step adds to an average is lost in rounding."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
