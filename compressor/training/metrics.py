"""How far the sharing of a model's weights has come, looked at between two epochs of its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from compressor.formats.content import Codebook, Table
from compressor.formats.dtypes import ITEM_SIZES
from compressor.report.weight_stats import entropy
from compressor.sharing.group import Group

__all__ = ["SharingMetrics", "SharingMonitor"]

Indices = NDArray[np.integer[Any]]
SAMPLE = 1 << 16  # indices of a tensor that are remembered, to tell how many change
NUMBER = 4  # bytes of a value, scale or offset


@dataclass(frozen=True)
class SharingMetrics:
    """What shared weights would take if training ended here.

    Args:
        bits: per weight that has an index: the order-0 entropy of each tensor's indices, where they are stored, and the
            values they stand for.
        fixed: share of the weights that have an index, 0 to 1; in rounds, the others are free as yet.
        changed: share of the weights whose index, counted in ascending values, is another than at the last look, on at
            most 65,536 of each tensor; None at the first look.
    """

    bits: float
    fixed: float
    changed: float | None


class SharingMonitor:
    """Looks at groups, and remembers of each look what the next is compared with.

    Example:
        >>> from compressor import Compressor, Policy, Rule
        >>> job = Compressor(torch.nn.Linear(8, 8), Policy([Rule("*", scheme="kmeans", codewords=2)])).prepare()
        >>> watch = SharingMonitor(job.groups)
        >>> first, second = watch.measure(), watch.measure()
        >>> first.changed, second.changed, second.fixed
        (None, 0.0, 1.0)
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = [group for group in groups if group.scheme.shares]
        self._before: dict[str, Indices] = {}

    @torch.no_grad()
    def measure(self) -> SharingMetrics | None:
        """Give how far it has come; None where nothing is shared."""
        weights = fixed = compared = 0
        bits = changed = 0.0
        for group in self.groups:
            found, stored = _kept(group) or _shared(group)
            weights, bits = weights + group.weights, bits + 8 * stored
            for name, indices in found.items():
                there = indices[indices >= 0]
                per_index = group.master_weight(_site(group, name)).numel() / max(
                    len(indices), 1
                )  # more than 1: vectors
                fixed += round(len(there) * per_index)
                bits += len(there) * entropy(np.bincount(there)) if len(there) else 0.0
                moved, of = self._changed(name, indices)
                changed, compared = changed + moved, compared + of
        share = changed / compared if compared else None
        return SharingMetrics(bits / max(fixed, 1), fixed / weights, share) if weights else None

    def _changed(self, name: str, indices: Indices) -> tuple[float, int]:
        """Give how many of a tensor's indices are others than before, estimated on some, and of how many."""
        some = indices[:: max(1, len(indices) // SAMPLE)].copy()
        before = self._before.get(name)
        self._before[name] = some
        both = np.zeros(0, bool) if before is None else (before >= 0) & (some >= 0)
        if not both.any():
            return 0.0, 0
        assert before is not None
        return float((before != some)[both].mean()) * len(indices), len(indices)


def _site(group: Group, name: str) -> Any:
    return next(site for site in group.sites if site.name == name)


def _kept(group: Group) -> tuple[Mapping[str, Indices], float] | None:
    """Give the indices a scheme keeps, -1 where free, and the bytes of the values; None where it keeps none."""
    if group.scheme.generator() is not None or not group.has_indices:
        return None
    found = {}
    for site in group.sites:
        indices = group.indices(site)
        if group.has_zeros:
            indices = indices.masked_fill(group.pruned(site), int(indices.max()) + 1)
        found[site.name] = indices.cpu().numpy().reshape(-1)
    zero = group.has_zeros and not bool((group.values == 0).any())
    return found, NUMBER * (len(group.values) + zero)


def _shared(group: Group) -> tuple[Mapping[str, Indices], float]:
    """Give the indices the file would hold, none where they are generated, and the bytes of all that goes with them."""
    shared = group.scheme.export(group)
    found, stored = {}, sum(map(_bytes, shared.books))
    for name, tensor in shared.tensors.items():
        stored += sum(NUMBER * len(numbers) for numbers in (tensor.scale, tensor.offset) if numbers is not None)
        found[name] = np.zeros(len(tensor.indices), np.uint8) if tensor.codec is not None else tensor.indices
    return found, float(stored)


def _bytes(book: Codebook) -> float:
    # A grid is three numbers in the header, which the report counts as such.
    return book.values.size * ITEM_SIZES[book.dtype] if isinstance(book, Table) else 0.0
