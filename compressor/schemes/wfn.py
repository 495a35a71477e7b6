"""Weight Fixing Networks: round by round, more weights of the whole network are fixed to a few values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from compressor.clustering.weight_fixing import fix
from compressor.formats.errors import PolicyError
from compressor.ops.gather_scatter import frozen_lookup
from compressor.ops.relative_distance import frozen_lookup_with_distance, relative_distance
from compressor.sharing.export import SharedTensors, export_scalars
from compressor.sharing.group_state import GroupState
from compressor.sharing.registry import register
from compressor.sharing.scheme import Scheme
from compressor.sharing.sites import Site

FRACTIONS = (0.3, 0.6, 0.8, 0.9, 0.95, 0.975, 0.99, 0.9975, 0.999, 1.0)
LARGEST_TOLERANCE = 0.75  # ten times the largest delta of the paper; at 1 the grid of candidates would end
SETTLED = 1e-6  # mean relative distance, float32's precision, below which there is nothing to pull


@register
@dataclass(frozen=True)
class WeightFixing(Scheme):
    """Fix more and more weights, all layers', to one set of sums of few powers of two; train the rest to follow.

    Each round fixes the weights that are nearest to a value in relation to their own size, the value with most
    weights first, and lets the others train on, drawn to the values there are. What is fixed stays fixed.

    Args:
        delta: how far a cluster's weights may be from its value, relative to each weight, in the mean. Rounds begin
            with as many times this as there are rounds. The number of values is an outcome.
        fractions: of all weights that are fixed after each round; the first before training, the last after it.
        zero_distance: weights smaller than this are fixed to 0: in standard deviations of their tensor.
        zero_absolute: take ``zero_distance`` as it is; the paper's is 2^-7, more than some networks' whole layers.
        penalty_ratio: value of the term that draws weights to the values, as a share of the task's loss.

    Reference: Subia-Waud, Dasmahapatra, "Weight Fixing Networks", ECCV 2022.
    """

    id: ClassVar[str] = "wfn"
    paper: ClassVar[str] = 'Subia-Waud, Dasmahapatra, "Weight Fixing Networks", ECCV 2022'

    delta: Annotated[float, Field(ge=1e-4, le=0.5)] = 0.01
    fractions: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)] = FRACTIONS
    zero_distance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.25
    zero_absolute: bool = False
    penalty_ratio: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.4

    @field_validator("fractions")
    @classmethod
    def _rising_to_all(cls, fractions: tuple[float, ...]) -> tuple[float, ...]:
        if list(fractions) != sorted(set(fractions)) or fractions[-1] != 1:
            raise ValueError("must rise, and end with 1.0")
        return fractions

    @property
    def whole_network(self) -> bool:
        """Always: the set of values is one for all tensors."""
        return True

    @classmethod
    def settings_for_bits(cls, bits: int) -> dict[str, Any]:
        """Refuse: the number of values is an outcome."""
        raise PolicyError(f"scheme 'wfn' takes delta and no bits, got {bits}: how many values there are is an outcome")

    def stored_values(self, weights: int) -> int:
        """One: a tensor adds few values, if any, to those of the whole network."""
        del weights
        return 1

    def fit(self, group: GroupState, importance: Mapping[Site, Tensor] | None) -> None:
        """Begin with all weights free and 0 the only value; how near to 0 is zero stays as it is now."""
        del importance
        near = [self._zero_below(group.survivors(site)) for site in group.sites]
        device = group.unit.device
        group.set_codebook(torch.zeros(1), learnt=False)
        group.register_buffer("zero_below", torch.tensor(near, dtype=torch.float64, device=device))
        group.register_buffer("rounds", torch.zeros((), dtype=torch.int64, device=device))
        group.register_buffer("pulled", torch.zeros(len(group.sites), 2, dtype=torch.float64, device=device))
        for site in group.sites:
            group.set_indices(site, torch.full_like(group.master_weight(site), -1), len(group.values))

    def _zero_below(self, weights: Tensor) -> float:
        # Divergence: relative to the tensor, for 2^-7 is more than whole layers of other networks.
        if self.zero_absolute or not len(weights):
            return self.zero_distance
        return self.zero_distance * float(weights.double().std(correction=0))

    def weight(self, group: GroupState, site: Site, master: Tensor) -> Tensor:
        """Give fixed weights their values; free ones are themselves."""
        group.step_cache.pop(site, None)
        if not (self.penalty_ratio and torch.is_grad_enabled()):
            return frozen_lookup(master, group.codebook(), _indices(group, site))
        weight, group.step_cache[site] = self._with_distance(group, site, master)
        return weight

    def _with_distance(self, group: GroupState, site: Site, master: Tensor) -> tuple[Tensor, Tensor]:
        pulled = group.get_buffer("pulled")[group.sites.index(site)]
        return frozen_lookup_with_distance(master, *_drawn(group, site), pulled)

    def on_step(self, group: GroupState, progress: float) -> float | None:
        """Do the rounds that are due: the first before the first step, the last after the last."""
        steps = len(self.fractions) - 1
        due = math.floor(progress * steps + 1e-9) + 1
        done = int(group.get_buffer("rounds"))
        if due <= done:
            return None
        group.step_cache.clear()
        for number in range(done, due):
            self._fix_round(group, number)
        _measure(group)
        group.get_buffer("rounds").fill_(due)
        return due / steps if due <= steps else None

    def _fix_round(self, group: GroupState, number: int) -> None:
        # Divergence from the authors' code, which clusters all weights anew in each round: what is fixed stays so.
        free = [(_indices(group, site) < 0).cpu().reshape(-1) for site in group.sites]
        masters = [group.master_weight(site).detach().float().cpu().reshape(-1) for site in group.sites]
        weights = torch.cat([master[chosen] for master, chosen in zip(masters, free, strict=True)]).numpy()
        sizes = [int(chosen.sum()) for chosen in free]
        wanted = int(group.weights * self.fractions[number]) - (group.weights - len(weights))
        if wanted > 0:
            codewords, found = self._choose(group, weights, sizes, wanted, number)
            parts = torch.from_numpy(_positions(group, codewords)[found]).split(sizes)
            for site, chosen, part in zip(group.sites, free, parts, strict=True):
                indices = group.indices(site).reshape(-1).cpu().int().masked_scatter(chosen, part)
                shaped = indices.view(group.master_weight(site).shape).to(group.unit.device)
                group.set_indices(site, shaped, len(group.values))

    def _choose(
        self, group: GroupState, weights: NDArray[np.float32], sizes: list[int], wanted: int, number: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Fix the weights near 0 to it, and of the others as many as are wanted still; -1 for none, codeword 0 is 0."""
        # Divergence: zeros first. Near zero is another interval in each tensor, so no window of the sorted weights.
        near = np.repeat(group.get_buffer("zero_below").cpu().numpy().astype(np.float64), sizes)
        size = np.abs(weights)
        is_zero = (size < near) | (weights == 0)
        found = np.full(len(weights), -1, dtype=np.int32)
        zeros = np.flatnonzero(is_zero)
        if len(zeros) >= wanted:
            nearest = size[zeros] / np.maximum(near[zeros], np.finfo(np.float64).tiny)
            found[zeros[np.argsort(nearest, kind="stable")[:wanted]]] = 0
            return np.zeros(1, np.float32), found
        found[zeros] = 0
        del near, size
        others = weights[~is_zero]
        rounds = len(self.fractions)
        tolerance = min(self.delta * max(1, rounds - number), LARGEST_TOLERANCE)
        smallest = self.zero_distance if self.zero_absolute and self.zero_distance else float(np.abs(others).min())
        dtypes = {group.master_weight(site).dtype for site in group.sites}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        codewords, chosen = fix(others, wanted - len(zeros), tolerance, smallest, dtype)
        found[~is_zero] = np.where(chosen < 0, -1, chosen + 1)
        return np.concatenate([np.zeros(1, np.float32), codewords]), found

    def penalty(self, group: GroupState, task: Tensor) -> Tensor | None:
        """Draw the free weights to the values there are; always ``penalty_ratio`` of the task's loss in value."""
        if not self.penalty_ratio:
            return None
        # Of the weights as they went through the network; of those that did not, as they are.
        for site in group.sites:
            if site not in group.step_cache:
                group.step_cache[site] = self._with_distance(group, site, group.master_weight(site))[1]
        drawn = torch.stack([group.step_cache.pop(site) for site in group.sites]).sum()
        # Divergence: the gradient is divided by the pull that the step before this one found, in the same pass as its
        # gradient; by this one's it would take a pass more.
        if _settled(group):
            _measure(group)  # what is not drawn may drift
            if _settled(group):
                return None
        scaled: Tensor = (1 + drawn / group.get_buffer("pulled")[:, 0].sum()).to(task)
        return scaled * (self.penalty_ratio * task)

    def export(self, group: GroupState) -> SharedTensors:
        """Give the values that are used, and which weight has which."""
        indices = {site: group.indices(site).cpu().int() for site in group.sites}
        used = torch.cat([found[found >= 0].unique() for found in indices.values()]).unique()
        renamed = torch.zeros(len(group.values), dtype=torch.int32)
        renamed[used] = torch.arange(len(used), dtype=torch.int32)
        codebook = group.codebook().detach()[used.to(group.unit.device)]
        return export_scalars(group, codebook, {site: renamed[found.clamp(min=0)] for site, found in indices.items()})


def _measure(group: GroupState) -> None:
    """Find out how far the free weights are from the values there are."""
    found = [relative_distance(group.master_weight(site).detach(), *_drawn(group, site)) for site in group.sites]
    group.get_buffer("pulled").copy_(torch.stack(found))


def _settled(group: GroupState) -> bool:
    """Tell whether no weight is free, or all that are have come to a value."""
    total, count = group.get_buffer("pulled").sum(0).tolist()
    return bool(total < SETTLED * count or not count)


def _drawn(group: GroupState, site: Site) -> tuple[Tensor, Tensor, Tensor]:
    """What draws the weights of a site, and which: codebook, indices, and below which magnitude 0 is no distance."""
    zero_below: Tensor = group.get_buffer("zero_below")[group.sites.index(site)]
    return group.codebook().detach(), _indices(group, site), zero_below


def _indices(group: GroupState, site: Site) -> Tensor:
    """The indices of a site, below 0 where a weight is neither fixed nor pruned, int[shape]."""
    indices = group.indices(site)
    return indices.masked_fill(group.pruned(site), 0) if group.has_zeros else indices


def _positions(group: GroupState, codewords: NDArray[np.float32]) -> NDArray[np.int32]:
    """Give the position of each codeword in the group's codebook, new ones at its end, float32[K]; and at last -1."""
    book = group.codebook().detach().cpu().tolist()
    where = {value: position for position, value in enumerate(book)}
    positions = [where.setdefault(value, len(where)) for value in codewords.tolist()]
    group.set_codebook(torch.tensor(list(where), dtype=torch.float32), learnt=False)
    return np.array([*positions, -1], dtype=np.int32)  # index -1 finds the last
