"""An exponential moving average of the weights in training, which is often better than the last weights."""

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

    The decay grows with the steps up to its limit, as with timm's ``--model-ema-warmup``, so that a short training
    forgets its initial weights too. Indices have no average: those of the last step are used. The average of a tensor
    restarts where the tensor changes its shape, as the codebook of a scheme with rounds may.

    Args:
        model: the model in training.
        decay: limit of the share of the average that a step keeps, 0 to 1.

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
        self._means = {name: _copy_in_float32(tensor) for name, tensor in self._trained()}

    def _trained(self) -> Iterator[tuple[str, Tensor]]:
        """Yields names and tensors of all that training changes and that can be averaged."""
        yield from ((name, parameter) for name, parameter in self._model.named_parameters() if parameter.requires_grad)
        yield from ((name, buffer) for name, buffer in self._model.named_buffers() if name.endswith(RUNNING_STATISTICS))

    @torch.no_grad()
    def update(self) -> None:
        """Takes the model's present weights into the average; called after each step."""
        self._steps += 1
        decay = min(self._decay, 1 - (1 + self._steps) ** (-2 / 3))
        means, current = [], []
        for name, tensor in self._trained():
            mean = self._means.get(name)
            if mean is None or mean.shape != tensor.shape:
                self._means[name] = _copy_in_float32(tensor)
            else:
                means.append(mean)
                current.append(tensor.detach().to(mean.dtype))
        if means:  # torch raises for empty lists
            get_ema_multi_avg_fn(decay)(means, current, None)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Sets the model's tensors to their averages."""
        for name, tensor in self._trained():
            tensor.copy_(self._means[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Sets the model's tensors to their averages inside, and back to the last ones afterwards."""
        last = {name: tensor.detach().clone() for name, tensor in self._trained()}
        self.copy_to_model()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in self._trained():
                    tensor.copy_(last[name])

    def state_dict(self) -> dict[str, Any]:
        """Returns the averages by name, and the number of steps."""
        return {"means": dict(self._means), "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict()`` returned, on the devices of the model's tensors."""
        devices = {name: tensor.device for name, tensor in self._trained()}
        self._means = {name: mean.to(devices[name], copy=True) for name, mean in state["means"].items()}
        self._steps = state["steps"]


def _copy_in_float32(tensor: Tensor) -> Tensor:
    """Copies a tensor to float32 at least, because half precision would round away what a step adds to an average."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
