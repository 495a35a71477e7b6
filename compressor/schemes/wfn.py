"""Weight Fixing Networks: in rounds, more and more weights of the whole network are fixed to a few values."""

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

from compressor.calibration.error_feedback import Round, compensate
from compressor.clustering.weight_fixing import fix
from compressor.formats.errors import PolicyError
from compressor.ops.gather_scatter import frozen_lookup
from compressor.ops.nearest import nearest
from compressor.ops.relative_distance import frozen_lookup_with_distance, relative_distance
from compressor.sharing.curvature import Curvature
from compressor.sharing.export import SharedTensors, export_scalars
from compressor.sharing.group_state import GroupState
from compressor.sharing.registry import register
from compressor.sharing.scheme import Scheme
from compressor.sharing.sites import Site

# Buffers of the group; the names are in checkpoints.
ZERO_BELOW = "zero_below"  # float64[sites]: the magnitude below which weights of a site are fixed to 0
ALL_FOUND = "all_found"  # bool scalar: whether the values were all found before the first round
ROUNDS_DONE = "rounds"  # int64 scalar
DISTANCES = "pulled"  # float64[sites, 2]: the summed relative distance of a site's free weights, and their number

CAPACITY = 4096  # values that the buffer of the codebook has room for; resnet18 needs 405 with a delta of 0.002

FRACTIONS = (0.3, 0.6, 0.8, 0.9, 0.95, 0.975, 0.99, 0.9975, 0.999, 1.0)
MAX_TOLERANCE = 0.75  # ten times the largest delta of the paper; at 1 the grid of candidates has infinite spacing
NEGLIGIBLE_DISTANCE = 1e-6  # mean relative distance, the precision of float32, below which there is no penalty


@register
@dataclass(frozen=True)
class WeightFixing(Scheme):
    """Fixes more weights in each round to one network-wide set of values, sums of few powers of two.

    With ``w`` the weights of all tensors, ``c`` the values chosen so far and T rounds, round t = 0..T-1 fixes weights
    until the share ``fractions[t]`` of all is fixed. It chooses one value after another, that with most weights nearest
    to it first, and fixes the weights nearest to it while the mean of their relative distances allows::

        D_ij = |w_i - c_j| / |w_i|        mean of D_ij over the cluster of c_j <= delta max(1, T - t)      algorithm 1

    A value has as few powers of two as it can. A fixed weight reads its value from the codebook and no longer changes;
    a free weight is its master weight and is trained. The first round comes before the first step and the last after
    the last step. Between them a penalty draws the free weights to the values there are::

        R = sum over free i of sum over j of softmin_j(D_ij / 0.05) D_ij        section 3
        loss = task + penalty_ratio task R / [R]                                [.]: as a constant

    Args:
        delta: the mean relative distance allowed within a cluster of the last round, 0.0001 to 0.5, default 0.01. The
            number of values is an outcome.
        fractions: shares of all weights that are fixed after each round, ascending, the last 1.0; default the paper's
            ten, from 0.3.
        zero_distance: weights of smaller magnitude are fixed to 0, in standard deviations of their tensor, >= 0;
            default 0.25.
        zero_absolute: whether ``zero_distance`` is an absolute magnitude instead, 2^-7 in the paper; default False.
        penalty_ratio: the value of the penalty as a share of the task's loss, >= 0, default 0.4; 0: no penalty.

    Example:
        >>> from compressor import Compressor, Policy, Rule
        >>> layer = torch.nn.Linear(4, 1, bias=False)
        >>> layer.weight.data = torch.tensor([[1.0, 0.51, 0.5, 0.01]])
        >>> rule = Rule("*", scheme="wfn", delta=0.05, fractions=[0.5, 1.0])
        >>> group = Compressor(layer, Policy([rule]), teacher=None).prepare().groups[0]
        >>> end_of_round = group.on_step(0.0)  # half of the weights are fixed before the first step
        >>> group.codebook().tolist(), group.indices(group.sites[0]).tolist()
        ([0.0, 0.5], [[-1, -1, 1, 0]])
        >>> end_of_round = group.on_step(1.0)
        >>> group.codebook().tolist(), group.indices(group.sites[0]).tolist()
        ([0.0, 0.5, 1.0], [[2, 1, 1, 0]])

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
        """Always true: the set of values is one for all tensors."""
        return True

    @classmethod
    def settings_for_bits(cls, bits: int) -> dict[str, Any]:
        """Raises PolicyError: the number of values is an outcome of ``delta``."""
        raise PolicyError(f"scheme 'wfn' takes delta and no bits, got {bits}: how many values there are is an outcome")

    def stored_values(self, weights: int) -> int:
        """Returns 1: a tensor adds few values, if any, to those of the whole network."""
        del weights
        return 1

    def fit(self, group: GroupState, curvature: Mapping[Site, Curvature] | None) -> None:
        """Sets every weight free, 0 as the only value, and how small the weights fixed to it are.

        Where the curvature is known, all values are found at once, and weights make up for each other's errors.
        """
        zero_below = [self._zero_below(group.survivors(site)) for site in group.sites]
        device = group.unit.device
        group.set_codebook(torch.zeros(1), learnt=False, capacity=CAPACITY)
        group.register_buffer(ZERO_BELOW, torch.tensor(zero_below, dtype=torch.float64, device=device))
        group.register_buffer(ROUNDS_DONE, torch.zeros((), dtype=torch.int64, device=device))
        group.register_buffer(DISTANCES, torch.zeros(len(group.sites), 2, dtype=torch.float64, device=device))
        group.register_buffer(ALL_FOUND, torch.tensor(False, device=device))
        _set_free(group)
        if curvature is not None:
            for number in range(len(self.fractions)):
                self._fix_round(group, number)
            _set_free(group)
            group.get_buffer(ALL_FOUND).fill_(True)
            compensate(group, curvature, lambda site: _rounding(group, site))

    def _zero_below(self, weights: Tensor) -> float:
        # Divergence: relative to the tensor. The paper's 2^-7 is more than all weights of some networks' layers.
        if self.zero_absolute or not len(weights):
            return self.zero_distance
        return self.zero_distance * float(weights.double().std(correction=0))

    def weight(self, group: GroupState, site: Site, master: Tensor) -> Tensor:
        """Returns the value of each fixed weight and the master weight where free; caches what ``penalty`` needs."""
        group.step_cache.pop(site, None)
        if not (self.penalty_ratio and torch.is_grad_enabled()):
            return frozen_lookup(master, group.codebook(), _indices(group, site))
        weight, group.step_cache[site] = self._with_distance(group, site, master)
        return weight

    def _with_distance(self, group: GroupState, site: Site, master: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the weight, and the number 0 that has the gradient of the site's summed relative distance."""
        measured = group.get_buffer(DISTANCES)[group.sites.index(site)]
        return frozen_lookup_with_distance(master, *_distance_arguments(group, site), measured)

    def on_step(self, group: GroupState, progress: float) -> float | None:
        """Does the rounds that are due; each but the last begins a round of training."""
        steps = len(self.fractions) - 1
        due = math.floor(progress * steps + 1e-9) + 1  # progress is steps / total steps, rounded
        done = int(group.get_buffer(ROUNDS_DONE))
        if due <= done:
            return None
        group.step_cache.clear()
        for number in range(done, due):
            self._fix_round(group, number)
        _measure_distances(group)
        group.get_buffer(ROUNDS_DONE).fill_(due)
        return due / steps if due <= steps else None

    def _fix_round(self, group: GroupState, number: int) -> None:
        """Fixes weights of the whole network until the share of this round is fixed."""
        # Divergence: the authors' code clusters all weights anew in each round; here what is fixed stays fixed.
        free = [(_indices(group, site) < 0).cpu().reshape(-1) for site in group.sites]
        masters = [group.master_weight(site).detach().float().cpu().reshape(-1) for site in group.sites]
        weights = torch.cat([master[is_free] for master, is_free in zip(masters, free, strict=True)]).numpy()
        sizes = [int(is_free.sum()) for is_free in free]
        wanted = int(group.weights * self.fractions[number]) - (group.weights - len(weights))
        if wanted > 0:
            if group.get_buffer(ALL_FOUND):
                codewords, chosen = _choose_nearest(group, weights, sizes, wanted)
            else:
                codewords, chosen = self._choose(group, weights, sizes, wanted, number)
            by_site = torch.from_numpy(_add_codewords(group, codewords)[chosen]).split(sizes)
            for site, is_free, new in zip(group.sites, free, by_site, strict=True):
                indices = group.indices(site).reshape(-1).cpu().int().masked_scatter(is_free, new)
                shaped = indices.view(group.master_weight(site).shape).to(group.unit.device)
                group.set_indices(site, shaped, len(group.values))

    def _choose(
        self, group: GroupState, weights: NDArray[np.float32], sizes: list[int], wanted: int, number: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Chooses values for weights: 0 for those near 0, then others until enough weights have one.

        Args:
            weights: float32[n], the free weights of all sites in a row.
            sizes: how many of them each site has.
            wanted: how many are to be fixed, 1 to n.
            number: of the round, t.

        Returns:
            float32[K], the values, the first of them 0; int32[n], the value of each weight, -1 for none.
        """
        # Divergence: zeros first. The interval about 0 differs from tensor to tensor, so that it is no window of the
        # sorted weights.
        zero_below = np.repeat(group.get_buffer(ZERO_BELOW).cpu().numpy().astype(np.float64), sizes)
        magnitude = np.abs(weights)
        is_zero = (magnitude < zero_below) | (weights == 0)
        chosen = np.full(len(weights), -1, dtype=np.int32)
        zeros = np.flatnonzero(is_zero)
        if len(zeros) >= wanted:
            relative = magnitude[zeros] / np.maximum(zero_below[zeros], np.finfo(np.float64).tiny)
            chosen[zeros[np.argsort(relative, kind="stable")[:wanted]]] = 0
            return np.zeros(1, np.float32), chosen
        chosen[zeros] = 0
        del zero_below, magnitude  # as large as the network, and clustering needs as much
        others = weights[~is_zero]
        tolerance = min(self.delta * max(1, len(self.fractions) - number), MAX_TOLERANCE)
        smallest = self.zero_distance if self.zero_absolute and self.zero_distance else float(np.abs(others).min())
        dtypes = {group.master_weight(site).dtype for site in group.sites}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        codewords, clusters = fix(others, wanted - len(zeros), tolerance, smallest, dtype)
        chosen[~is_zero] = np.where(clusters < 0, -1, clusters + 1)
        return np.concatenate([np.zeros(1, np.float32), codewords]), chosen

    def penalty(self, group: GroupState, task: Tensor) -> Tensor | None:
        """Returns a term that draws free weights to the values, ``penalty_ratio`` times the task's loss in value."""
        if not self.penalty_ratio:
            return None
        # The distances of this step's forward pass; for a layer that was not part of it, that of its master weight.
        for site in group.sites:
            if site not in group.step_cache:
                group.step_cache[site] = self._with_distance(group, site, group.master_weight(site))[1]
        distance = torch.stack([group.step_cache.pop(site) for site in group.sites]).sum()
        # Divergence: the gradient is divided by the distance at the step before, which was measured in the same pass as
        # that step's gradient. Dividing by the distance at this step would need a pass over the weights more.
        if _nothing_to_draw(group):
            _measure_distances(group)  # weights that are not drawn may have drifted
            if _nothing_to_draw(group):
                return None
        one: Tensor = (1 + distance / group.get_buffer(DISTANCES)[:, 0].sum()).to(task)  # distance is 0 in value
        return one * (self.penalty_ratio * task)

    def export(self, group: GroupState) -> SharedTensors:
        """Returns the values that some weight has, and the value of each weight."""
        indices = {site: group.indices(site).cpu().int() for site in group.sites}
        used = torch.cat([index[index >= 0].unique() for index in indices.values()]).unique()
        new_index = torch.zeros(len(group.values), dtype=torch.int32)
        new_index[used] = torch.arange(len(used), dtype=torch.int32)
        codebook = group.codebook().detach()[used.to(group.unit.device)]
        return export_scalars(group, codebook, {site: new_index[index.clamp(min=0)] for site, index in indices.items()})


def _set_free(group: GroupState) -> None:
    """Sets every weight free."""
    for site in group.sites:
        group.set_indices(site, torch.full_like(group.master_weight(site), -1), len(group.values))


def _rounding(group: GroupState, site: Site) -> Round:
    """Returns the rounding of columns of weights to the values there are, for error feedback."""
    values, zero_below = group.codebook().detach().sort().values, _zero_bound(group, site)

    def rounded(weights: Tensor, _: Tensor) -> Tensor:
        return values[nearest(weights, values).long()].masked_fill(weights.abs() < zero_below, 0)

    return rounded


def _choose_nearest(
    group: GroupState, weights: NDArray[np.float32], sizes: list[int], wanted: int
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Chooses values among those there are, as ``_choose`` does, for the weights that are nearest to theirs."""
    zero_below = np.repeat(group.get_buffer(ZERO_BELOW).cpu().numpy().astype(np.float64), sizes)
    values = group.codebook().detach().cpu().sort().values
    chosen = nearest(torch.from_numpy(weights), values).numpy()
    chosen[np.abs(weights) < zero_below] = int((values == 0).nonzero())
    distance = np.abs(weights - values.numpy()[chosen]) / np.maximum(np.abs(weights), np.finfo(np.float32).tiny)
    distance[np.abs(weights) < zero_below] = 0
    chosen[np.argsort(distance, kind="stable")[wanted:]] = -1
    return values.numpy(), chosen


def _measure_distances(group: GroupState) -> None:
    """Sets the buffer of distances from the master weights and values of this moment."""
    sites = [(group.master_weight(site).detach(), *_distance_arguments(group, site)) for site in group.sites]
    group.get_buffer(DISTANCES).copy_(torch.stack([relative_distance(*site) for site in sites]))


def _nothing_to_draw(group: GroupState) -> bool:
    """Returns whether no weight is free, or all free weights lie on a value."""
    total, count = group.get_buffer(DISTANCES).sum(0).tolist()
    return bool(total < NEGLIGIBLE_DISTANCE * count or not count)


def _distance_arguments(group: GroupState, site: Site) -> tuple[Tensor, Tensor, Tensor]:
    """Returns codebook, indices and ``ZERO_BELOW`` of a site: all its distances depend on but the weights."""
    return group.codebook().detach(), _indices(group, site), _zero_bound(group, site)


def _zero_bound(group: GroupState, site: Site) -> Tensor:
    """Returns the magnitude below which weights of a site are 0, float64 scalar."""
    zero_below: Tensor = group.get_buffer(ZERO_BELOW)[group.sites.index(site)]
    return zero_below


def _indices(group: GroupState, site: Site) -> Tensor:
    """Returns the indices of a site, int[shape], below 0 where a weight is neither fixed nor pruned."""
    indices = group.indices(site)
    return indices.masked_fill(group.pruned(site), 0) if group.has_zeros else indices


def _add_codewords(group: GroupState, codewords: NDArray[np.float32]) -> NDArray[np.int32]:
    """Adds the codewords that are new to the end of the group's codebook.

    Returns:
        int32[K + 1]: the index of each codeword in the codebook, then -1, so that looking up -1 gives -1.
    """
    codebook = group.codebook().detach().cpu().tolist()
    index_of = {value: index for index, value in enumerate(codebook)}
    indices = [index_of.setdefault(value, len(index_of)) for value in codewords.tolist()]
    group.set_codebook(torch.tensor(list(index_of), dtype=torch.float32), learnt=False, capacity=CAPACITY)
    return np.array([*indices, -1], dtype=np.int32)
