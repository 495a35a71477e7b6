"""How far the sharing of a model's weights has come, measured between epochs of its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from compressor.formats.content import Codebook, Grid, Table
from compressor.formats.dtypes import ITEM_SIZES
from compressor.report.weight_stats import entropy
from compressor.sharing.group import Group

__all__ = ["Priced", "SharingMetrics", "SharingMonitor"]

Indices = NDArray[np.integer[Any]]
SAMPLE = 1 << 16  # indices of a tensor that are compared between two measurements
NUMBER_BYTES = 4  # of a value, scale or offset


class Priced(Protocol):
    """What holds the size of the file by a price."""

    @property
    def price(self) -> float:
        """The price of a bit, in the loss of one image."""

    @property
    def predicted(self) -> int:
        """Bytes of the file, were training to end now."""

    @property
    def target(self) -> int:
        """Bytes of the file that are wanted."""

    is_held: bool
    """Whether anything is held in training."""


@dataclass(frozen=True)
class SharingMetrics:
    """The size of the shared weights if training ended here, and how much of the sharing is done.

    Args:
        bits: per weight that has an index: the order-0 entropy of each tensor's indices, where they are stored, plus
            codewords, scales and offsets.
        fixed: share of the weights that have an index, 0 to 1; schemes with rounds leave the others free at first.
        changed: share of the weights whose index differs from the last measurement, with codewords in ascending
            order and those of a grid counted from zero, estimated on at most 65,536 of each tensor; None at the first
            measurement.
        price: of a bit, where it holds the size of the file.
        size: bytes of the file as predicted, likewise.
        target_size: bytes of the file that are wanted, likewise.
    """

    bits: float
    fixed: float
    changed: float | None
    price: float | None = None
    size: int | None = None
    target_size: int | None = None


class SharingMonitor:
    """Measures the sharing of groups, each time in comparison with the time before.

    Args:
        groups: of the model.
        control: what holds the size of the file; None: nothing does.

    Example:
        >>> from compressor import Compressor, Policy, Rule
        >>> job = Compressor(torch.nn.Linear(8, 8), Policy([Rule("*", scheme="kmeans", codewords=2)])).prepare()
        >>> monitor = SharingMonitor(job.groups)
        >>> first, second = monitor.measure(), monitor.measure()
        >>> first.changed, second.changed, second.fixed
        (None, 0.0, 1.0)
    """

    def __init__(self, groups: Sequence[Group], control: Priced | None = None) -> None:
        self.control = control
        self.groups = [group for group in groups if group.scheme.shares]
        self._before: dict[str, tuple[Indices, int]] = {}

    @torch.no_grad()
    def measure(self) -> SharingMetrics | None:
        """Returns the present figures; None where nothing is shared."""
        weights = fixed = compared = 0
        bits = changed = 0.0
        for group in self.groups:
            all_indices, firsts, value_bytes = _own_indices(group) or _exported_indices(group)
            weights, bits = weights + group.weights, bits + 8 * value_bytes
            for name, indices in all_indices.items():
                assigned = indices[indices >= 0]
                # A codeword may be a vector, so that an index stands for several weights.
                weights_per_index = group.master_weight(_site(group, name)).numel() / max(len(indices), 1)
                fixed += round(len(assigned) * weights_per_index)
                bits += len(assigned) * entropy(np.bincount(assigned)) if len(assigned) else 0.0
                changed_here, compared_here = self._count_changed(name, indices, firsts.get(name, 0))
                changed, compared = changed + changed_here, compared + compared_here
        share = changed / compared if compared else None
        control = self.control if self.control is not None and self.control.is_held else None
        held = () if control is None else (control.price, control.predicted, control.target)
        return SharingMetrics(bits / max(fixed, 1), fixed / weights, share, *held) if weights else None

    def _count_changed(self, name: str, indices: Indices, first: int) -> tuple[float, int]:
        """Returns how many of a tensor's indices have changed, estimated on a sample, and how many were compared.

        Args:
            name: of the tensor.
            indices: -1 where a weight is free.
            first: what a codeword's number is above its index: a grid has the codewords that occur, and loses some.
        """
        sample = indices[:: max(1, len(indices) // SAMPLE)].astype(np.int64)
        before, first_before = self._before.get(name, (None, 0))
        self._before[name] = sample, first
        if before is None or not (assigned_twice := (before >= 0) & (sample >= 0)).any():
            return 0.0, 0
        return float((before + first_before != sample + first)[assigned_twice].mean()) * len(indices), len(indices)


def _site(group: Group, name: str) -> Any:
    return next(site for site in group.sites if site.name == name)


def _own_indices(group: Group) -> tuple[Mapping[str, Indices], Mapping[str, int], float] | None:
    """Returns the indices that a group holds, -1 where free, and the bytes of its values; None where it holds none."""
    if group.scheme.generator() is not None or not group.has_indices:
        return None
    all_indices = {}
    for site in group.sites:
        indices = group.indices(site)
        if group.has_zeros:
            indices = indices.masked_fill(group.pruned(site), int(indices.max()) + 1)
        all_indices[site.name] = indices.cpu().numpy().reshape(-1)
    extra_zero = group.has_zeros and not bool((group.values == 0).any())
    return all_indices, {}, NUMBER_BYTES * (group.codeword_count + extra_zero)


def _exported_indices(group: Group) -> tuple[Mapping[str, Indices], Mapping[str, int], float]:
    """Returns the indices that the file would hold, the numbers of grids' first steps, and the bytes of all values.

    Indices that the reader generates count as zeros, which have no entropy.
    """
    shared = group.scheme.export(group)
    all_indices, firsts, value_bytes = {}, {}, sum(map(_bytes, shared.books))
    for name, tensor in shared.tensors.items():
        value_bytes += sum(
            NUMBER_BYTES * len(numbers) for numbers in (tensor.scale, tensor.offset) if numbers is not None
        )
        all_indices[name] = np.zeros(len(tensor.indices), np.uint8) if tensor.codec is not None else tensor.indices
        book = shared.books[tensor.book]
        firsts[name] = round(book.start / book.step) if isinstance(book, Grid) and book.step else 0
    return all_indices, firsts, float(value_bytes)


def _bytes(book: Codebook) -> float:
    # A grid is three numbers in the header, and the report counts them there.
    return book.values.size * ITEM_SIZES[book.dtype] if isinstance(book, Table) else 0.0
