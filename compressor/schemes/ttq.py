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
from compressor.sharing.curvature import Curvature, diagonals
from compressor.sharing.export import SharedTensors, export_scalars
from compressor.sharing.group_state import GroupState
from compressor.sharing.registry import register
from compressor.sharing.scheme import Scheme
from compressor.sharing.sites import Site

NEGATIVE, ZERO, POSITIVE = 0, 1, 2  # the codes of a weight
SCALE_WITHOUT_WEIGHTS = 2.0**-7  # both scales where no weight is beyond the threshold, in the group's unit
MIN_IMPORTANCE = 1e-30  # where no weight has any importance, all count alike


@register
@dataclass(frozen=True)
class TTQ(Scheme):
    """Makes each weight -Wn, 0 or Wp by a threshold, and trains both scales together with the weights.

    With ``w`` the N master weights of a tensor, ``Wn`` and ``Wp`` its two scales >= 0, D its threshold, L the loss and
    ``g_i = dL/dweight_i``::

        D = threshold max |w|
        weight_i = -Wn where w_i < -D, Wp where w_i > D, else 0
        dL/dWp = sum of g_i over w_i > D
        dL/dWn = -(sum of g_i over w_i < -D)
        dL/dw_i = Wn g_i where w_i < -D, Wp g_i where w_i > D, else g_i

    Master weights go on changing sides of the threshold, so zeros come and go. A scale starts at the mean magnitude of
    its weights.

    Args:
        threshold: share of the largest magnitude up to which a weight is 0, 0 to below 1; default 0.05.
        zeros: share of the weights that are 0, the smallest, 0 to below 1; default 0, above it replaces the threshold.

    Example:
        >>> from compressor import Compressor, Policy, Rule
        >>> layer = torch.nn.Linear(4, 1, bias=False)
        >>> layer.weight.data = torch.tensor([[-1.0, 0.125, 0.5, 0.75]])
        >>> job = Compressor(layer, Policy([Rule("*", scheme="ttq", threshold=0.25)]), teacher=None).prepare()
        >>> job.model.weight.tolist()
        [[-1.0, 0.0, 0.625, 0.625]]

    Reference: Zhu, Han, Mao, Dally, "Trained Ternary Quantization", ICLR 2017.
    """

    id: ClassVar[str] = "ttq"
    paper: ClassVar[str] = 'Zhu, Han, Mao, Dally, "Trained Ternary Quantization", ICLR 2017'

    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.05
    zeros: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @classmethod
    def settings_for_bits(cls, bits: int) -> dict[str, Any]:
        """Returns no settings for 2 bits, which three values take.

        Raises:
            PolicyError: ``bits`` is not 2.
        """
        if bits != 2:
            raise PolicyError(f"scheme {cls.id!r} has three values, which are 2 bits, got {bits}")
        return {}

    def stored_values(self, weights: int) -> int:
        """Returns 3: both scales, and zero."""
        del weights
        return 3

    def fit(self, group: GroupState, curvature: Mapping[Site, Curvature] | None) -> None:
        """Sets each scale to the mean magnitude of its weights."""
        # Divergence: the paper's code starts both at 1.0, whatever the size of the weights; the means have least error.
        importance = diagonals(curvature)
        means = [_mean(group, self, code, importance) for code in (NEGATIVE, POSITIVE)]
        defined = [mean for mean in means if mean is not None]
        default = defined[0] if defined else SCALE_WITHOUT_WEIGHTS * float(group.unit)
        group.set_codebook(torch.tensor([default if mean is None else mean for mean in means]), learnt=True)

    def weight(self, group: GroupState, site: Site, master: Tensor) -> Tensor:
        """Returns the value of each master weight's side of the threshold, with the paper's gradients."""
        return ternary(master, group.codebook(), self.codes(group, site, master))

    def codes(self, group: GroupState, site: Site, master: Tensor) -> Tensor:
        """Returns which of ``-Wn``, 0 and ``Wp`` each weight is, as 0, 1 and 2: int32[shape]."""
        master = master.detach().float()
        if group.has_zeros:
            master = master.masked_fill(group.pruned(site), 0)
        if self.zeros:
            smallest = _smallest_mask(master, math.floor(self.zeros * master.numel()))
            return _sides(master, 0.0).masked_fill_(smallest, ZERO)
        least, most = torch.aminmax(master)
        return _sides(master, self.threshold * torch.maximum(-least, most))

    def on_step(self, group: GroupState, progress: float) -> float | None:
        """Raises negative scales to 0, so that ``-Wn`` and ``Wp`` keep their signs."""
        del progress
        group.values.clamp_(min=0)  # a scale can grow from 0 again, because its gradient does not depend on it
        return None

    def export(self, group: GroupState) -> SharedTensors:
        """Returns the three values and the code of each weight."""
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
    """Returns ``-Wn``, 0 or ``Wp`` by code, with the paper's gradients of master weights and scales.

    Args:
        master: float[shape], the master weights.
        scales: float32[2], ``Wn`` and ``Wp``.
        codes: int32[shape]: 0, 1 and 2.

    Returns:
        float32[shape].

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
    # This minus sign gives the gradient of Wn its sign, which the paper's formula, as printed, lacks.
    return torch.stack([-scales[0], torch.zeros_like(scales[0]), scales[1]])


def _sides(master: Tensor, threshold: Tensor | float) -> Tensor:
    return (master > threshold).int().add_(ZERO).sub_((master < -threshold).int())


def _smallest_mask(master: Tensor, count: int) -> Tensor:
    """Returns a mask of the ``count`` weights of least magnitude, of equal ones the first in order, without a sort."""
    magnitude = master.abs().reshape(-1)
    if count == 0:
        return torch.zeros_like(master, dtype=torch.bool)
    border = magnitude.kthvalue(count).values
    below, equal = magnitude < border, magnitude == border
    mask = below | (equal & (equal.cumsum(0) <= count - below.sum()))
    return mask.view_as(master)


def _mean(group: GroupState, scheme: TTQ, code: int, importance: Mapping[Site, Tensor] | None) -> float | None:
    """Returns the mean magnitude of the weights with this code, by importance; None where there are none."""
    total = count = 0.0
    for site in group.sites:
        master = group.master_weight(site).detach()
        chosen = scheme.codes(group, site, master) == code
        size = master[chosen].double().abs()
        mass = torch.ones_like(size) if importance is None else importance[site][chosen].double()
        mass.clamp_(min=MIN_IMPORTANCE)
        total, count = total + float((size * mass).sum()), count + float(mass.sum())
    return total / count if count > 0 else None
