"""BatchNorm statistics, estimated anew for weights that have changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compressor.data.batches import check_batch
from compressor.training.modes import modules_in_eval, restored_modes, train_mode

__all__ = ["estimate_batch_norm"]


@torch.no_grad()
def estimate_batch_norm(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    in_eval: Iterable[nn.Module] = (),
    loss: Callable[[nn.Module], float] | None = None,
) -> None:
    """Estimates the statistics of BatchNorm layers anew, as the mean over all batches, and restores all modes.

    Where that fails, all is left as it was.

    Layers in eval mode, where the model is in training mode, keep their statistics.

    Args:
        model: the model.
        batches: (inputs, targets); the targets are not used.
        in_eval: modules that keep their statistics, too.
        loss: of the model; the statistics become what they were unless that is lower by the new ones. None: they stay.

    Raises:
        UsageError: a batch is neither a tensor nor a pair of them.
    """
    kept = {*in_eval, *modules_in_eval(model)}
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module not in kept]
    if not norms:
        return
    device = next(model.parameters()).device
    before = math.inf if loss is None else loss(model)
    states = [{name: one.clone() for name, one in norm.state_dict().items()} for norm in norms]
    momenta = [norm.momentum for norm in norms]
    is_better = False
    try:
        with restored_modes(model):
            train_mode(model, kept)
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the mean over all batches
            for batch in batches:
                model(_inputs(batch).to(device))
        is_better = loss is None or loss(model) < before
    finally:
        for norm, momentum, state in zip(norms, momenta, states, strict=True):
            norm.momentum = momentum
            if not is_better:
                norm.load_state_dict(state)


def _inputs(batch: Any) -> Tensor:
    """Returns the inputs of a batch, which may be all that it has."""
    if not isinstance(batch, Tensor | list | tuple):
        check_batch(batch)
    inputs: Tensor = batch if isinstance(batch, Tensor) else batch[0]
    return inputs
