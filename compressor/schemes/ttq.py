"""Trained ternary quantisation: a negative value, zero and a positive value per tensor, both scales learnt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from compressor.formats.errors import PolicyError
from compressor.ops.buffer_pool import active_pool
from compressor.ops.gather_scatter import straight_through
from compressor.ops.parallel import cache_chunks
from compressor.sharing.export import SharedTensors, export_scalars
from compressor.sharing.group_state import GroupState
from compressor.sharing.registry import register
from compressor.sharing.scheme import Scheme
from compressor.sharing.sites import Site

NEGATIVE, ZERO, POSITIVE = 0, 1, 2
UNUSED = 2.0**-7  # of the tensor's unit: the scales where no weight says what they should be
LEAST = 1e-30  # importance: where all have none, all count alike


@register
@dataclass(frozen=True)
class TTQ(Scheme):
    """Let a weight be ``-Wn``, 0 or ``Wp``, by which side of a threshold it is on; learn ``Wn`` and ``Wp``.

    With ``D = threshold * max |w|`` the weight is ``Wp`` where ``w > D``, ``-Wn`` where ``w < -D``, else 0. Its
    gradient ``g`` goes to ``Wp`` as the sum over the first, to ``Wn`` as minus the sum over the second, and to the
    master weights as ``Wp g``, ``Wn g`` and, at the zeros, ``g``: weights change sides, and zeros come and go.

    Args:
        threshold: share of the largest magnitude up to which a weight is 0.
        zeros: share of the weights that are 0, the smallest, whatever the largest is; 0: the threshold decides.

    Reference: Zhu, Han, Mao, Dally, "Trained Ternary Quantization", ICLR 2017.
    """

    id: ClassVar[str] = "ttq"
    paper: ClassVar[str] = 'Zhu, Han, Mao, Dally, "Trained Ternary Quantization", ICLR 2017'

    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.05
    zeros: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @classmethod
    def settings_for_bits(cls, bits: int) -> dict[str, Any]:
        """Take 2, which say nothing: there are three values."""
        if bits != 2:
            raise PolicyError(f"scheme {cls.id!r} has three values, which are 2 bits, got {bits}")
        return {}

    def stored_values(self, weights: int) -> int:
        """Both scales, and zero."""
        del weights
        return 3

    def fit(self, group: GroupState, importance: Mapping[Site, Tensor] | None) -> None:
        """Start each scale at the mean of its weights."""
        # The paper's code starts both at 1.0, of whatever size the weights are; the means lose least.
        means = [_mean(group, self, code, importance) for code in (NEGATIVE, POSITIVE)]
        known = [mean for mean in means if mean is not None]
        other = known[0] if known else UNUSED * float(group.unit)
        group.set_codebook(torch.tensor([other if mean is None else mean for mean in means]), learnt=True)

    def weight(self, group: GroupState, site: Site, master: Tensor) -> Tensor:
        """Give three values, by the side of the threshold each master weight is on now."""
        return ternary(master, group.codebook(), self.codes(group, site, master))

    def codes(self, group: GroupState, site: Site, master: Tensor) -> Tensor:
        """Tell which of ``-Wn``, 0 and ``Wp`` each weight is, as 0, 1 and 2: int32 of the shape of ``master``."""
        master = master.detach().float()
        if group.has_zeros:
            master = master.masked_fill(group.pruned(site), 0)
        if self.zeros:
            return _sides(master, 0.0).masked_fill_(_smallest(master, math.floor(self.zeros * master.numel())), ZERO)
        least, most = torch.aminmax(master)
        return _sides(master, self.threshold * torch.maximum(-least, most))

    def on_step(self, group: GroupState, progress: float) -> float | None:
        """Keep the scales from changing their signs."""
        del progress
        group.values.clamp_(min=0)  # from 0 a scale may grow again, for its gradient does not depend on it
        return None

    def export(self, group: GroupState) -> SharedTensors:
        """Give the three values and the codes."""
        codes = {site: self.codes(group, site, group.master_weight(site)) for site in group.sites}
        return export_scalars(group, _codebook(group.codebook()), codes)


class _Scaled(Function):
    """The master weights in float32; their gradient is multiplied by ``factors[codes]``."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, factors: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(factors, codes)
        ctx.dtype, ctx.pool = master.dtype, active_pool()
        return master.float().view_as(master)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        factors, codes = ctx.saved_tensors
        largest = torch.finfo(ctx.dtype).max  # an infinite gradient would become NaN in the optimiser
        scaled = ctx.pool.empty(gradient.shape, gradient.dtype, gradient.device)
        flat, flat_codes, flat_scaled = gradient.reshape(-1), codes.view(-1), scaled.view(-1)
        for chunk in cache_chunks(flat_codes):
            factor = factors.index_select(0, flat_codes[chunk].int())
            torch.mul(flat[chunk], factor, out=flat_scaled[chunk]).clamp_(-largest, largest)
        return scaled.to(ctx.dtype), None, None


def ternary(master: Tensor, scales: Tensor, codes: Tensor) -> Tensor:
    """Give ``-Wn``, 0 or ``Wp`` by code, with the paper's gradients of master weights and scales.

    Args:
        master: float, the trained dense weights.
        scales: float32[2], ``Wn`` and ``Wp``.
        codes: int32 of the shape of ``master``: 0, 1 and 2.

    Example:
        >>> master, scales = torch.tensor([-0.9, 0.0, 0.7], requires_grad=True), torch.tensor([0.5, 0.25])
        >>> weight = ternary(master, scales, torch.tensor([0, 1, 2], dtype=torch.int32))
        >>> weight.sum().backward()
        >>> weight.tolist(), master.grad.tolist()
        ([-0.5, 0.0, 0.25], [0.5, 1.0, 0.25])
    """
    negative, positive = scales.detach()
    factors = torch.stack([negative, torch.ones_like(negative), positive])
    codes = codes.to(torch.uint8).contiguous()  # both functions keep this one
    scaled: Tensor = _Scaled.apply(master, factors, codes)
    return straight_through(scaled, _codebook(scales), codes)


def _codebook(scales: Tensor) -> Tensor:
    # The minus sign here gives Wn its own in the gradient, which the paper's formula, as printed, lacks.
    return torch.stack([-scales[0], torch.zeros_like(scales[0]), scales[1]])


def _sides(master: Tensor, threshold: Tensor | float) -> Tensor:
    return (master > threshold).int().add_(ZERO).sub_((master < -threshold).int())


def _smallest(master: Tensor, count: int) -> Tensor:
    """Mark the ``count`` weights of least magnitude, of equals the first in order; without sorting all of them."""
    size = master.abs().reshape(-1)
    if count == 0:
        return torch.zeros_like(master, dtype=torch.bool)
    border = size.kthvalue(count).values
    below, equal = size < border, size == border
    marked = below | (equal & (equal.cumsum(0) <= count - below.sum()))
    return marked.view_as(master)


def _mean(group: GroupState, scheme: TTQ, code: int, importance: Mapping[Site, Tensor] | None) -> float | None:
    """Give the mean magnitude of the weights with this code, by importance; None where there are none."""
    total = count = 0.0
    for site in group.sites:
        master = group.master_weight(site).detach()
        chosen = scheme.codes(group, site, master) == code
        size = master[chosen].double().abs()
        factor = torch.ones_like(size) if importance is None else importance[site][chosen].double().clamp(min=LEAST)
        total, count = total + float((size * factor).sum()), count + float(factor.sum())
    return total / count if count > 0 else None
