"""The reference: what the dense model answers to the calibration images, to measure a compressed model by."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from compressor.calibration.images import batches_of
from compressor.training.modes import eval_mode

__all__ = ["Reference"]


class Reference:
    """Images, and the answers of the dense model to them.

    Args:
        model: the model.
        dense: its dense weights by name; those that are not named are its own.
        images: float[n, ...].
    """

    def __init__(self, model: nn.Module, dense: Mapping[str, Tensor], images: Tensor) -> None:
        self.images = images
        self.answers = self._answers(model, dense)

    def loss(self, model: nn.Module, weights: Mapping[str, Tensor] | None = None) -> float:
        """Returns the mean Kullback-Leibler divergence of a model's answers from those of the dense one, in nats.

        Args:
            model: the model.
            weights: by name, in place of its own; None: its own.
        """
        answers = self._answers(model, weights or {})
        divergence = functional.kl_div(answers, self.answers.to(answers), reduction="sum", log_target=True)
        return float(divergence) / max(1, answers[..., 0].numel())

    @torch.no_grad()
    def _answers(self, model: nn.Module, weights: Mapping[str, Tensor]) -> Tensor:
        """Returns log-probabilities, float32[n, ..., classes]."""
        like = next(model.parameters())
        parts = []
        with eval_mode(model):
            for batch in batches_of(self.images):
                inputs = batch.to(like.device, like.dtype if batch.is_floating_point() else None)
                parts.append(functional_call(model, dict(weights), (inputs,)).float().movedim(1, -1).log_softmax(-1))
        return torch.cat(parts)
