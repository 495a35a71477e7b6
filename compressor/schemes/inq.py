"""Incremental network quantisation: weights become powers of two in portions, the largest first."""

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

from compressor.ops.gather_scatter import frozen_lookup
from compressor.sharing.export import SharedTensors, export_scalars
from compressor.sharing.group_state import GroupState
from compressor.sharing.registry import register
from compressor.sharing.scheme import Scheme
from compressor.sharing.sites import Site

LEAST_BITS, MOST_BITS = 2, 8
LOWEST = -125  # exponent of the least codeword: half of it, the least weight not rounded to 0, is no subnormal yet

# The paper's, for ResNet-18; more bits take those of 5.
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
    """Round the largest weights to powers of two and freeze them, train the rest to make up for it, and again.

    With ``s`` the largest magnitude of a tensor, its values are 0 and ``+-2^k``, ``n2 <= k <= n1``, for
    ``n1 = floor(log2(4 s / 3))`` and ``n2 = n1 + 1 - 2^(bits - 2)``. A weight is rounded to ``2^k`` from
    ``0.75 * 2^k`` on, and to 0 below ``2^(n2 - 1)``. What is frozen no longer changes; what is free is what is trained.
    Of T portions the first is frozen before training and the last after it, with T - 1 equal rounds between.

    The largest weight sets the range: with 2 or 3 bits most weights become 0, and a few epochs do not make up for it.
    The paper allows 2 bits 30 epochs where it allows the others 8.

    Args:
        bits: one for zero, the rest for sign and exponent: ``2^(bits - 1) + 1`` values.
        portions: share of the weights that is frozen when each round begins, and 1 at the end; none: the paper's.

    Reference: Zhou, Yao, Guo, Xu, Chen, "Incremental Network Quantization", ICLR 2017.
    """

    id: ClassVar[str] = "inq"
    paper: ClassVar[str] = 'Zhou, Yao, Guo, Xu, Chen, "Incremental Network Quantization", ICLR 2017'
    bits_taken: ClassVar[tuple[int, int]] = LEAST_BITS, MOST_BITS

    bits: Annotated[int, Field(ge=LEAST_BITS, le=MOST_BITS, strict=True)] = 5
    portions: Annotated[tuple[float, ...], AfterValidator(_ascending_to_one)] = ()

    def stored_values(self, weights: int) -> int:
        """Both signs of each power, and zero."""
        del weights
        return 2 * _powers(self.bits) + 1

    def fit(self, group: GroupState, importance: Mapping[Site, Tensor] | None) -> None:
        """Choose the powers of two; all weights are free as yet."""
        del importance  # the powers follow from the largest weight alone
        group.set_codebook(_powers_of_two(group, _powers(self.bits)), learnt=False)
        group.register_buffer("rounds", torch.zeros((), dtype=torch.int64))
        for site in group.sites:
            group.set_indices(site, torch.full_like(group.master_weight(site), -1), len(group.values))

    def weight(self, group: GroupState, site: Site, master: Tensor) -> Tensor:
        """Give powers of two where frozen, the master weights where free."""
        return frozen_lookup(master, group.codebook(), group.indices(site))

    def on_step(self, group: GroupState, progress: float) -> float | None:
        """Freeze the portions that are due; between one and the next is a round of training."""
        portions = self.portions or PORTIONS.get(self.bits, PORTIONS[5])
        rounds = max(1, len(portions) - 1)  # a single portion is frozen at once
        due = sum(number / rounds <= progress for number in range(len(portions)))
        if due <= int(group.get_buffer("rounds")):
            return None
        group.get_buffer("rounds").fill_(due)
        for site in group.sites:
            _freeze(group, site, portions[due - 1])
        return due / rounds if due < len(portions) else None

    def export(self, group: GroupState) -> SharedTensors:
        """Give the powers of two and the indices."""
        return export_scalars(group, group.codebook(), {site: group.indices(site) for site in group.sites})


def _powers(bits: int) -> int:
    return 1 << (bits - 2)


def _powers_of_two(group: GroupState, powers: int) -> Tensor:
    """Give zero and both signs of the powers of two up to the group's largest weight, ascending: float32[K]."""
    left = [weights for site in group.sites if len(weights := group.survivors(site))]
    mantissa, exponent = math.frexp(max((float(weights.abs().max()) for weights in left), default=0.0))
    finite = min(math.frexp(torch.finfo(group.master_weight(site).dtype).max)[1] - 1 for site in group.sites)
    highest = min(max(exponent - (mantissa < 0.75), LOWEST), finite)
    lowest = max(highest + 1 - powers, LOWEST)
    positive = [2.0**power for power in range(lowest, highest + 1)]
    return torch.tensor([*(-value for value in reversed(positive)), 0.0, *positive])


def _freeze(group: GroupState, site: Site, portion: float) -> None:
    """Freeze the largest free weights of a site, until this share of those not pruned is frozen."""
    master, indices = group.master_weight(site).detach(), group.indices(site)
    survive = ~group.pruned(site)
    free = survive & (indices < 0)
    frozen = int(survive.sum() - free.sum())
    more = max(0, round(portion * int(survive.sum())) - frozen)
    # The authors' code ranks frozen weights again, by then rounded down, and so sets some of them free. And of equal
    # weights it freezes all at once, which ties at a power of two make far too many.
    size = master.abs().masked_fill(~free, -1).reshape(-1)
    chosen = torch.zeros_like(size, dtype=torch.bool)
    chosen[torch.sort(size, descending=True, stable=True).indices[:more]] = True
    found = _quantise(master.float(), group.codebook())
    group.set_indices(site, torch.where(chosen.view_as(indices), found, indices), len(group.values))


def _quantise(weights: Tensor, codebook: Tensor) -> Tensor:
    """Find the codeword of each weight by the paper's equation 4: int32 of the shape of ``weights``.

    Args:
        weights: float32.
        codebook: as ``_powers_of_two`` gives it.
    """
    powers = len(codebook) // 2
    highest = math.frexp(float(codebook[-1]))[1] - 1
    size = weights.abs()
    # floor(log2(4 |w| / 3)) without a logarithm, whose rounding would move the borders
    mantissa, exponent = torch.frexp(size)
    step = exponent - (mantissa < 0.75).int() - highest + powers
    # Equation 4 has 0 for a free weight that training took to 1.5 * 2^n1 and beyond: here it is the largest codeword.
    step = step.clamp(1, powers).masked_fill(size < codebook[powers + 1] / 2, 0)
    return (torch.where(weights < 0, -step, step) + powers).int()
