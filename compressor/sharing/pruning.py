"""Magnitude pruning: the smallest weights become the codeword 0.0, under any scheme, and stay so."""

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

__all__ = ["Pruning", "make_pruning", "smallest", "split_settings"]

ROUNDING = 1e-9  # of shares of the training that were computed from steps


@dataclass(frozen=True)
class Pruning:
    """How many weights of a tensor are zero, and by when.

    Between ``sparsity_from`` and ``sparsity_by`` the share of zeros rises from ``sparsity_start`` along
    ``s_end + (s_start - s_end) (1 - t)^power``: many at first, when many are superfluous, few at the end.

    Args:
        sparsity: share of zeros at the end, 0 to 1.
        sparsity_by: when it is reached, as a share of the training; 0: at once.
        sparsity_start: share of zeros when pruning begins.
        sparsity_from: when pruning begins, as a share of the training; nothing is pruned before.
        sparsity_power: of the polynomial.
        sparsity_every: share of the training between two looks for the smallest weights; 0: after each step.

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
        """Give the share of zeros at this point of the training, 0 to 1."""
        if progress < self.sparsity_from:
            return 0.0
        if progress >= self.sparsity_by:
            return self.sparsity
        left = (self.sparsity_by - progress) / (self.sparsity_by - self.sparsity_from)
        return self.sparsity + (self.sparsity_start - self.sparsity) * math.pow(left, self.sparsity_power)

    def last_look(self, progress: float) -> float:
        """Give when the smallest weights were looked for last: from the begin on, and when the end is reached."""
        since = progress - self.sparsity_from
        if since < 0 or progress >= self.sparsity_by or not self.sparsity_every:
            return progress
        return self.sparsity_from + math.floor(since / self.sparsity_every + ROUNDING) * self.sparsity_every

    def on_step(self, group: GroupState, progress: float) -> None:
        """Prune each tensor of the group to the level due; what is pruned stays pruned."""
        level = self.level(self.last_look(progress))
        for site in group.sites:
            pruned = group.pruned(site)
            wanted = round(level * pruned.numel())
            if int(pruned.sum()) < wanted:
                group.prune(site, smallest(group.master_weight(site), wanted, pruned))


KEYS = tuple(setting.name for setting in fields(Pruning))


def split_settings(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part a rule's settings into the scheme's and those of its pruning.

    >>> split_settings({"bits": 4, "sparsity": 0.9})
    ({'bits': 4}, {'sparsity': 0.9})
    """
    return tuple({k: v for k, v in settings.items() if (k in KEYS) is ours} for ours in (False, True))  # type: ignore[return-value]


def make_pruning(settings: Mapping[str, Any], where: str) -> Pruning | None:
    """Build a pruning from settings; None for none. Raises PolicyError, naming ``where``, for values it cannot take."""
    if not settings:
        return None
    if "sparsity" not in settings:
        raise PolicyError(f"{where} has {', '.join(settings)} without sparsity")
    with one_line_errors(PolicyError, lambda setting: f"{where}, {setting}"):
        made = TypeAdapter(Pruning).validate_python(dict(settings))
    if made.sparsity_by < made.sparsity_from:
        raise PolicyError(f"{where}: sparsity_by {made.sparsity_by:g} is before sparsity_from {made.sparsity_from:g}")
    return made


def smallest(master: Tensor, count: int, pruned: Tensor) -> Tensor:
    """Mark the ``count`` weights of least magnitude, those pruned before first; of equals, the first in order.

    Args:
        master: float, any shape.
        pruned: bool of that shape.

    Example:
        >>> smallest(torch.tensor([3.0, -1.0, 2.0]), 1, torch.zeros(3, dtype=torch.bool)).tolist()
        [False, True, False]
    """
    size = master.detach().abs().masked_fill(pruned, -1).reshape(-1)
    order = torch.sort(size, stable=True).indices
    marked = torch.zeros_like(size, dtype=torch.bool)
    marked[order[:count]] = True
    return marked.view_as(pruned)
