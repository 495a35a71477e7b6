"""The importance of weights: the sensitivity of the loss to an error in each, estimated from a few batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor.data.batches import check_batch
from compressor.sharing.sites import Site
from compressor.training.modes import eval_mode

__all__ = ["Batches", "squared_gradients"]

Batches = Iterable[tuple[Tensor, Tensor]]


def squared_gradients(model: nn.Module, sites: Sequence[Site], batches: Batches) -> dict[Site, Tensor]:
    """Estimates how sensitive the loss is to an error in each weight: the diagonal of the Fisher information.

    Args:
        model: in any mode, which is restored; its gradients are not touched.
        sites: the tensors to estimate it for.
        batches: pairs of inputs and targets.

    Returns:
        For each site float32[shape], the sum over batches of the squared gradient of their mean cross entropy.

    Raises:
        UsageError: a batch is no pair of tensors.

    Reference: LeCun, Denker, Solla, "Optimal Brain Damage", NIPS 1990, with gradients in place of curvatures.
    """
    total = {site: torch.zeros_like(site.tensor, dtype=torch.float32) for site in sites}
    with eval_mode(model), _all_differentiable(sites):
        for batch in batches:
            check_batch(batch)
            inputs, targets = batch
            value = functional.cross_entropy(model(inputs), targets)
            gradients = torch.autograd.grad(value, [site.tensor for site in sites], allow_unused=True)
            for site, gradient in zip(sites, gradients, strict=True):
                if gradient is not None:
                    total[site] += gradient.float().square()
    return total


@contextmanager
def _all_differentiable(sites: Sequence[Site]) -> Iterator[None]:
    """Lets frozen tensors have gradients inside."""
    frozen = [site.tensor for site in sites if not site.tensor.requires_grad]
    try:
        for tensor in frozen:
            tensor.requires_grad_(True)
        yield
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)
