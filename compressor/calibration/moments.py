"""Second moments of the inputs of one layer, of consecutive ranges of its columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import overload

import torch
from torch import Tensor, nn

from compressor.calibration.cholesky import column_major, factorise
from compressor.calibration.error_feedback import is_dead
from compressor.calibration.layer_views import unfolded_parts
from compressor.sharing.curvature import LayerView

__all__ = ["Moments", "MomentsOnDemand"]

EXACT = 600  # columns: up to so many, sums are float64, which factorisations of nearly singular moments need
WIDEST = 8192  # columns of a range
NARROWEST = 16  # columns of a range that is worth a factorisation
COPIES = 2  # of the moments at a time: themselves, and a factor
CORRECTION_DAMPING = 0.1  # of the mean of the diagonal; 0.05 and 0.2 are as good


class Moments:
    """The second moments of what a layer is given, and how it differs from what the dense model gives.

    Args:
        view: of the weight as matrices.
        memory: bytes that all may take together, about.
        weight: float[shape], the dense weights.
    """

    def __init__(self, view: LayerView, memory: int, weight: Tensor) -> None:
        self.view, self.weight = view, weight.detach()
        _, self.dtype = _width(view, memory)
        self.ranges = _ranges(view, memory)
        shapes = [(view.groups, one.stop - one.start, one.stop - one.start) for one in self.ranges]
        self.sums = [torch.zeros(shape, dtype=self.dtype, device=weight.device) for shape in shapes]
        self.drifts: list[Tensor] = []
        """Sums of (dense outputs - outputs) times inputs, float[G, rows, d], where a layer has these columns alone and
        its dense weights; empty while its inputs are those of the dense model."""

    @staticmethod
    def size(view: LayerView, memory: int) -> int:
        """Returns the bytes that the moments of a layer take, with what is computed from them."""
        width, dtype = _width(view, memory)
        return COPIES * view.groups * view.columns * width * dtype.itemsize

    def add(self, module: nn.Module, inputs: Tensor, dense: Tensor | None = None) -> None:
        """Adds one batch.

        Args:
            module: the layer.
            inputs: what it is given.
            dense: what it is given in the dense model; None: the same.
        """
        if not self.ranges:
            return
        for columns in unfolded_parts(module, inputs, self.view):
            for total, one in zip(self.sums, self.ranges, strict=True):
                _add_product(total, columns[..., one], columns[..., one])
        if dense is not None:
            self._add_drift(module, inputs, dense)

    def _add_drift(self, module: nn.Module, inputs: Tensor, dense: Tensor) -> None:
        """Adds one batch to the drifts."""
        matrices = self.view.matrices(self.weight).float()
        if not self.drifts:
            shapes = [(*matrices.shape[:2], one.stop - one.start) for one in self.ranges]
            self.drifts = [torch.zeros(shape, dtype=self.dtype, device=inputs.device) for shape in shapes]
        parts = (unfolded_parts(module, one, self.view) for one in (inputs, dense))
        for columns, before in zip(*parts, strict=True):
            change = before - columns
            for total, one in zip(self.drifts, self.ranges, strict=True):
                _add_product(total, change[..., one] @ matrices[..., one].mT, columns[..., one])

    def corrected(self) -> Tensor | None:
        """Returns the weights by which the layer answers its inputs as it answered those of the dense model.

        They are the regression of the dense outputs on the present inputs, damped towards the dense weights.

        Returns:
            float32[shape]; None where the inputs are those of the dense model.
        """
        if not self.drifts:
            return None
        result = self.view.matrices(self.weight).float().clone()
        for moment, drift, one in zip(self.sums, self.drifts, self.ranges, strict=True):
            diagonal = moment.diagonal(dim1=1, dim2=2)
            mean = diagonal.mean(dim=1, keepdim=True) * self.view.columns / self.view.all_columns
            lower = column_major(moment)
            lower.diagonal(dim1=1, dim2=2).add_(CORRECTION_DAMPING * mean + torch.finfo(self.dtype).tiny)
            if not factorise(lower):
                continue
            half = torch.linalg.solve_triangular(lower, drift.mT, upper=False)
            change = torch.linalg.solve_triangular(lower.mT, half, upper=True).mT
            result[..., one] += change.masked_fill(is_dead(moment)[:, None], 0).float()
        return self.view.tensor(result) if bool(torch.isfinite(result).all()) else None


class MomentsOnDemand(Sequence[Tensor]):
    """The moments of one layer, which are measured whenever they are read: those of all layers take too much memory.

    Args:
        view: of the weight as matrices.
        memory: as for ``Moments``.
        measure: returns the moments of each range.
    """

    def __init__(self, view: LayerView, memory: int, measure: Callable[[], Sequence[Tensor]]) -> None:
        self._count, self._measure = len(_ranges(view, memory)), measure

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._measure() if self._count else ())

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        return self._measure()[index]


def _ranges(view: LayerView, memory: int) -> list[slice]:
    """Returns the ranges of columns, none where only the diagonal fits."""
    width, _ = _width(view, memory)
    starts = range(0, view.columns, width) if width else ()
    return [slice(start, min(start + width, view.columns)) for start in starts]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds ``left^T right``, in place: a product of its own may be as large as all the sums."""
    if total.dtype == left.dtype:
        total.baddbmm_(left.mT, right)
    else:
        total += left.mT @ right


def _width(view: LayerView, memory: int) -> tuple[int, torch.dtype]:
    """Returns the columns of a range, 0 where only the diagonal fits, and the dtype of the sums."""
    dtype = torch.float64 if view.columns <= EXACT else torch.float32
    width = min(view.columns, WIDEST, memory // max(1, COPIES * view.groups * view.columns * dtype.itemsize))
    return (width if width >= min(view.columns, NARROWEST) else 0), dtype
