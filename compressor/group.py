"""Groups: the sites that share one codebook, and all their state as tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from compressor.sites import Site

if TYPE_CHECKING:
    from compressor.scheme import Scheme

__all__ = ["Group"]


class _Precondition(Function):
    """Identity whose gradient is multiplied by a constant."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


class Group(nn.Module):
    """The sites that share one codebook; codebook, indices and scheme state are parameters and buffers.

    The codebook is kept in units of the weights' spread, a power of two, so that one learning rate suits all
    layers and no digit is lost. Sites are held in a plain list: they are not registered, yet a deep copy of the
    model carries copies that point into the copy.

    Args:
        scheme: the scheme that governs this group.
        sites: its sites, in state-dict order.
    """

    unit: Tensor

    def __init__(self, scheme: Scheme, sites: list[Site]) -> None:
        super().__init__()
        self.scheme = scheme
        self.sites = sites
        self._latents = [site.tensor for site in sites]
        self.weights = sum(latent.numel() for latent in self._latents)
        spread = math.sqrt(sum(float(_sum_of_squares(latent)) for latent in self._latents) / max(self.weights, 1))
        self.register_buffer("unit", torch.tensor(_power_of_two(spread), device=self._latents[0].device))

    def latent(self, site: Site) -> Tensor:
        """The dense trained tensor behind a site."""
        return self._latents[self.sites.index(site)]

    def set_codebook(self, codebook: Tensor, learnt: bool) -> None:
        """Replace the codebook, float32[K]; ``learnt`` makes it a parameter."""
        values = codebook.detach().to(self.unit) / self.unit
        self._parameters.pop("values", None)
        self._buffers.pop("values", None)
        if learnt:
            self.values: Tensor = nn.Parameter(values)
        else:
            self.register_buffer("values", values)

    def codebook(self) -> Tensor:
        """The codebook, float32[K], differentiable where it is learnt.

        Its gradient is scaled so that under plain gradient descent a codeword moves by the learning rate times
        the mean gradient of its weights (the sum would be thousands of times a weight's own), if all codewords
        were used alike. The optimisers that normalise do not notice.
        """
        factor = len(self.values) / (self.weights * float(self.unit) ** 2)
        values: Tensor = _Precondition.apply(self.values, factor)
        return values * self.unit

    def set_indices(self, site: Site, indices: Tensor) -> None:
        """Keep the indices of a site: int[shape], -1 where an entry is still free."""
        self.register_buffer(self._indices_name(site), indices.to(torch.int32))

    def indices(self, site: Site) -> Tensor:
        """The kept indices of a site, int32[shape]."""
        kept: Tensor = getattr(self, self._indices_name(site))
        return kept

    def _indices_name(self, site: Site) -> str:
        return f"indices_{self.sites.index(site)}"

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Let codebooks and indices change shape: a scheme may grow its codebook in training."""
        for held in (self._parameters, self._buffers):
            for name, tensor in held.items():
                saved = state_dict.get(prefix + name)
                if tensor is not None and isinstance(saved, Tensor) and saved.shape != tensor.shape:
                    tensor.data = tensor.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """Name scheme and sites."""
        return f"{self.scheme}, {', '.join(site.name for site in self.sites)}"


def _sum_of_squares(latent: Tensor) -> Tensor:
    return (latent.detach().double() - latent.detach().double().mean()).square().sum()


def _power_of_two(spread: float) -> float:
    return 2.0 ** max(-20, min(20, round(math.log2(spread)))) if spread > 0 else 1.0
