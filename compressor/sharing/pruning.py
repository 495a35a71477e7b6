"""Magnitude pruning: the smallest weights become the codeword 0.0 under any scheme, and stay so."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass
from torch import Tensor

from compressor.formats.errors import PolicyError
from compressor.sharing.group_state import GroupState
from compressor.validation import one_line_errors

__all__ = ["Pruning", "make_pruning", "smallest_mask", "split_settings"]

ROUNDING = 1e-9
"""Tolerance of a progress that was computed as steps / total steps and meets a multiple of ``sparsity_every``."""


@dataclass(frozen=True)
class Pruning:
    """The share of a tensor's weights that is zero as training progresses, a polynomial that levels off.

    With progress ``p`` the share is 0 before ``sparsity_from``, ``sparsity`` from ``sparsity_by`` on, and between::

        s(p) = s_end + (s_start - s_end) (1 - t)^power      t = (p - from) / (by - from)

    Many weights are pruned early, while many are superfluous, and few towards the end. A pruned weight stays pruned.

    Args:
        sparsity: s_end, the share of zeros at the end, 0 to below 1.
        sparsity_by: progress at which it is reached, 0 to 1; 0, the default: before training.
        sparsity_start: s_start, the share of zeros when pruning begins, 0 to below 1; default 0.
        sparsity_from: progress at which pruning begins, 0 to ``sparsity_by``; default 0.
        sparsity_power: exponent, above 0 to 100; default 3.
        sparsity_every: progress between two updates of the mask, 0 to 1, default 0.01; 0: after each step.

    Example:
        >>> pruning = Pruning(sparsity=0.8, sparsity_by=0.5)
        >>> [round(pruning.level(progress), 2) for progress in (0, 0.25, 0.5, 1)]
        [0.0, 0.7, 0.8, 0.8]

    Reference: Zhu, Gupta, "To Prune, or Not to Prune", 2017, equation 1; Han, Pool, Tran, Dally, NeurIPS 2015.
    """

    sparsity: Annotated[float, Field(ge=0, lt=1)]
    sparsity_by: Annotated[float, Field(ge=0, le=1)] = 0.0
    sparsity_start: Annotated[float, Field(ge=0, lt=1)] = 0.0
    sparsity_from: Annotated[float, Field(ge=0, le=1)] = 0.0
    sparsity_power: Annotated[float, Field(gt=0, le=100)] = 3.0
    sparsity_every: Annotated[float, Field(ge=0, le=1)] = 0.01

    def level(self, progress: float) -> float:
        """Returns the share of zeros, 0 to 1, that is due at this progress."""
        if progress < self.sparsity_from:
            return 0.0
        if progress >= self.sparsity_by:
            return self.sparsity
        left = (self.sparsity_by - progress) / (self.sparsity_by - self.sparsity_from)
        return self.sparsity + (self.sparsity_start - self.sparsity) * math.pow(left, self.sparsity_power)

    def last_update(self, progress: float) -> float:
        """Returns the progress at which the mask was to be updated last, no later than ``progress``."""
        since = progress - self.sparsity_from
        if since < 0 or progress >= self.sparsity_by or not self.sparsity_every:
            return progress
        return self.sparsity_from + math.floor(since / self.sparsity_every + ROUNDING) * self.sparsity_every

    def on_step(self, group: GroupState, progress: float) -> None:
        """Prunes each tensor of the group to the share due at this progress; what is pruned stays pruned."""
        level = self.level(self.last_update(progress))
        for site in group.sites:
            pruned = group.pruned(site)
            due = round(level * pruned.numel())
            if int(pruned.sum()) < due:
                group.prune(site, smallest_mask(group.master_weight(site), due, pruned))


PRUNING_SETTINGS = tuple(setting.name for setting in fields(Pruning))


def split_settings(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the settings of a rule in two parts: those of its scheme, and those of its pruning.

    Example:
        >>> split_settings({"bits": 4, "sparsity": 0.9})
        ({'bits': 4}, {'sparsity': 0.9})
    """
    scheme = {name: value for name, value in settings.items() if name not in PRUNING_SETTINGS}
    pruning = {name: value for name, value in settings.items() if name in PRUNING_SETTINGS}
    return scheme, pruning


def make_pruning(settings: Mapping[str, Any], where: str) -> Pruning | None:
    """Returns the pruning that settings ask for, or None where there are none.

    Args:
        settings: settings of ``Pruning`` by name; empty: no pruning.
        where: the start of error messages, such as ``"rule 'fc'"``.

    Raises:
        PolicyError: ``sparsity`` is missing, a value is out of range, or pruning ends before it begins.
    """
    if not settings:
        return None
    if "sparsity" not in settings:
        raise PolicyError(f"{where} has {', '.join(settings)} without sparsity")
    with one_line_errors(PolicyError, lambda setting: f"{where}, {setting}"):
        pruning = TypeAdapter(Pruning).validate_python(dict(settings))
    if pruning.sparsity_by < pruning.sparsity_from:
        begin, end = pruning.sparsity_from, pruning.sparsity_by
        raise PolicyError(f"{where}: sparsity_by {end:g} is before sparsity_from {begin:g}")
    return pruning


def smallest_mask(master: Tensor, count: int, pruned: Tensor) -> Tensor:
    """Returns a mask of the ``count`` weights of least magnitude, bool[shape].

    Weights that are pruned already come first, whatever their magnitude; of equal weights the first in C order.

    Args:
        master: float[shape].
        count: how many weights to mark, 0 to N.
        pruned: bool[shape].

    Example:
        >>> smallest_mask(torch.tensor([3.0, -1.0, 2.0]), 1, torch.zeros(3, dtype=torch.bool)).tolist()
        [False, True, False]
    """
    magnitude = master.detach().abs().masked_fill(pruned, -1).reshape(-1)
    order = torch.sort(magnitude, stable=True).indices
    mask = torch.zeros_like(magnitude, dtype=torch.bool)
    mask[order[:count]] = True
    return mask.view_as(pruned)
