"""Incremental network quantisation: the weights become powers of two in portions, the largest first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, ClassVar

import torch
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError
from torch import Tensor

from compressor.calibration.error_feedback import compensate
from compressor.ops.gather_scatter import frozen_lookup
from compressor.sharing.curvature import Curvature
from compressor.sharing.export import SharedTensors, export_scalars
from compressor.sharing.group_state import GroupState
from compressor.sharing.registry import register
from compressor.sharing.scheme import Scheme
from compressor.sharing.sites import Site

ROUNDS_DONE = "rounds"  # buffer: int64 scalar, the portions that are frozen; the name is in checkpoints
MIN_BITS, MAX_BITS = 2, 8
# Exponent of the smallest codeword: half of that, the smallest weight not rounded to 0, is a normal float32 still.
MIN_EXPONENT = -125

# By bits, as the paper has them for ResNet-18; more bits take the portions of 5.
PORTIONS = {
    2: (0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.975, 1.0),
    3: (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0),
    4: (0.3, 0.5, 0.8, 0.9, 0.95, 1.0),
    5: (0.5, 0.75, 0.875, 1.0),
}


def _ascending_to_one(portions: tuple[float, ...]) -> tuple[float, ...]:
    if portions and not (portions[-1] == 1 and all(low < high for low, high in pairwise((0.0, *portions)))):
        raise PydanticCustomError("portions", "must be shares of the weights that ascend to 1, such as [0.5, 0.75, 1]")
    return portions


@register
@dataclass(frozen=True)
class INQ(Scheme):
    """Rounds the largest weights to powers of two, freezes them and trains the rest, until none is free.

    With ``w`` the weights of a tensor, its values are 0 and ``+-2^k`` for the whole numbers ``n2 <= k <= n1``::

        s = max |w|        n1 = floor(log2(4 s / 3))        n2 = n1 + 1 - 2^(bits - 1) / 2

    A weight is rounded to the value ``b`` of its sign, where ``a < b`` are neighbours among the magnitudes 0 and 2^k
    (equation 4)::

        (a + b) / 2 <= |w| < 3 b / 2

    that is to ``2^k`` from ``0.75 * 2^k`` on, and to 0 below ``2^(n2 - 1)``. A frozen weight reads its value from the
    codebook and no longer changes; a free weight is its master weight and is trained. Of T portions the first is frozen
    before the first step and the last after the last step, with T - 1 equal rounds of training between them.

    The largest weight sets the range: with 2 or 3 bits most weights become 0, and a few epochs do not make up for it.
    The paper allows 2 bits 30 epochs a round where it allows the others 8.

    Args:
        bits: one for zero, the rest for sign and exponent, ``2^(bits - 1) + 1`` values; 2 to 8, default 5.
        portions: shares of the weights that are frozen when each round begins, ascending, the last 1.0; empty, the
            default: the paper's for ResNet-18 at so many bits.

    Example:
        >>> from compressor import Compressor, Policy, Rule
        >>> layer = torch.nn.Linear(4, 1, bias=False)
        >>> layer.weight.data = torch.tensor([[1.0, -0.75, 0.5, 0.125]])
        >>> rule = Rule("*", scheme="inq", bits=2, portions=[0.5, 1.0])
        >>> job = Compressor(layer, Policy([rule]), teacher=None).prepare()
        >>> group = job.groups[0]
        >>> group.on_step(0.0), group.indices(group.sites[0]).tolist()  # half is frozen for a round that ends at 1.0
        (1.0, [[2, 0, -1, -1]])
        >>> group.on_step(1.0)
        >>> job.model.weight.tolist()
        [[1.0, -1.0, 1.0, 0.0]]

    Reference: Zhou, Yao, Guo, Xu, Chen, "Incremental Network Quantization", ICLR 2017, section 2.
    """

    id: ClassVar[str] = "inq"
    paper: ClassVar[str] = 'Zhou, Yao, Guo, Xu, Chen, "Incremental Network Quantization", ICLR 2017'
    bits_range: ClassVar[tuple[int, int]] = MIN_BITS, MAX_BITS

    bits: Annotated[int, Field(ge=MIN_BITS, le=MAX_BITS, strict=True)] = 5
    portions: Annotated[tuple[float, ...], AfterValidator(_ascending_to_one)] = ()

    def stored_values(self, weights: int) -> int:
        """Returns the number of values: both signs of each power of two, and zero."""
        del weights
        return 2 * _power_count(self.bits) + 1

    def fit(self, group: GroupState, curvature: Mapping[Site, Curvature] | None) -> None:
        """Sets the powers of two, and every weight free; with curvature, weights make up for each other's errors."""
        codebook = _powers_of_two(group, _power_count(self.bits))  # they follow from the largest weight alone
        group.set_codebook(codebook, learnt=False)
        compensate(group, curvature, lambda _: lambda weights, _: codebook[_quantise(weights, codebook).long()])
        group.register_buffer(ROUNDS_DONE, torch.zeros((), dtype=torch.int64))
        for site in group.sites:
            group.set_indices(site, torch.full_like(group.master_weight(site), -1), len(group.values))

    def weight(self, group: GroupState, site: Site, master: Tensor) -> Tensor:
        """Returns the power of two of each frozen weight, and the master weight where free."""
        return frozen_lookup(master, group.codebook(), group.indices(site))

    def on_step(self, group: GroupState, progress: float) -> float | None:
        """Freezes the portions that are due; each but the last begins a round of training."""
        portions = self.portions or PORTIONS.get(self.bits, PORTIONS[5])
        rounds = max(1, len(portions) - 1)  # a single portion is frozen at once
        due = sum(number / rounds <= progress for number in range(len(portions)))
        done = group.get_buffer(ROUNDS_DONE)
        if due <= int(done):
            return None
        done.fill_(due)
        for site in group.sites:
            _freeze(group, site, portions[due - 1])
        return due / rounds if due < len(portions) else None

    def export(self, group: GroupState) -> SharedTensors:
        """Returns the powers of two and the indices."""
        return export_scalars(group, group.codebook(), {site: group.indices(site) for site in group.sites})


def _power_count(bits: int) -> int:
    """Returns how many powers of two there are, of one sign."""
    return 1 << (bits - 2)


def _powers_of_two(group: GroupState, count: int) -> Tensor:
    """Returns zero and both signs of the powers of two up to the group's largest weight, float32[K] ascending."""
    survivors = [weights for site in group.sites if len(weights := group.survivors(site))]
    mantissa, exponent = math.frexp(max((float(weights.abs().max()) for weights in survivors), default=0.0))
    largest_finite = min(math.frexp(torch.finfo(group.master_weight(site).dtype).max)[1] - 1 for site in group.sites)
    n1 = min(max(exponent - (mantissa < 0.75), MIN_EXPONENT), largest_finite)
    n2 = max(n1 + 1 - count, MIN_EXPONENT)
    positive = [2.0**power for power in range(n2, n1 + 1)]
    return torch.tensor([*(-value for value in reversed(positive)), 0.0, *positive])


def _freeze(group: GroupState, site: Site, portion: float) -> None:
    """Freezes the largest free weights of a site, until this share of those not pruned is frozen."""
    master, indices = group.master_weight(site).detach(), group.indices(site)
    survives = ~group.pruned(site)
    free = survives & (indices < 0)
    frozen = int(survives.sum() - free.sum())
    more = max(0, round(portion * int(survives.sum())) - frozen)
    # Divergence: the authors' code ranks frozen weights too. Those have been rounded, some of them down, and so some
    # become free again. It also freezes all of several equal weights, which ties at a power of two make far too many.
    magnitude = master.abs().masked_fill(~free, -1).reshape(-1)
    chosen = torch.zeros_like(magnitude, dtype=torch.bool)
    chosen[torch.sort(magnitude, descending=True, stable=True).indices[:more]] = True
    quantised = _quantise(master.float(), group.codebook())
    group.set_indices(site, torch.where(chosen.view_as(indices), quantised, indices), len(group.values))


def _quantise(weights: Tensor, codebook: Tensor) -> Tensor:
    """Returns the index of each weight's codeword by the paper's equation 4, int32[shape].

    Args:
        weights: float32[shape].
        codebook: float32[K], the result of ``_powers_of_two``.
    """
    powers = len(codebook) // 2
    n1 = math.frexp(float(codebook[-1]))[1] - 1
    magnitude = weights.abs()
    # floor(log2(4 |w| / 3)) without a logarithm, whose rounding would move the borders.
    mantissa, exponent = torch.frexp(magnitude)
    step = exponent - (mantissa < 0.75).int() - n1 + powers
    # Divergence: by equation 4 a free weight that training took to 1.5 * 2^n1 and beyond becomes 0; here 2^n1.
    step = step.clamp(1, powers).masked_fill(magnitude < codebook[powers + 1] / 2, 0)
    return (torch.where(weights < 0, -step, step) + powers).int()
