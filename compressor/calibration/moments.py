"""Second moments of the inputs of one layer, of consecutive ranges of its columns."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compressor.calibration.error_feedback import is_dead
from compressor.calibration.layer_views import unfolded_inputs
from compressor.sharing.curvature import LayerView

__all__ = ["Moments"]

EXACT = 600  # columns: up to so many, sums are float64, which factorisations of nearly singular moments need
WIDEST = 8192  # columns of a range
NARROWEST = 16  # columns of a range that is worth a factorisation
CHUNK = 1 << 24  # numbers that are unfolded at a time
COPIES = 4  # of the moments at a time: those of two kinds, a factor, and its inverse
CORRECTION_DAMPING = 0.1  # of the mean of the diagonal; 0.05 and 0.2 are as good


class Moments:
    """The second moments of what a layer is given, and how it differs from what the dense model gives.

    Args:
        view: of the weight as matrices.
        memory: bytes that all may take together, about.
        device: of the sums.
    """

    def __init__(self, view: LayerView, memory: int, device: torch.device) -> None:
        self.view = view
        width, self.dtype = _width(view, memory)
        starts = range(0, view.columns, width) if width else ()
        self.ranges = [slice(start, min(start + width, view.columns)) for start in starts]
        shapes = [(view.groups, one.stop - one.start, one.stop - one.start) for one in self.ranges]
        self.sums = [torch.zeros(shape, dtype=self.dtype, device=device) for shape in shapes]
        self.drifts: list[Tensor] = []
        """Sums of (dense inputs - inputs) times inputs, as ``sums``; empty while both are the same."""

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
        if dense is not None and not self.drifts:
            self.drifts = [torch.zeros_like(one) for one in self.sums]
        unfolded = self.view.columns * self.view.groups
        positions = max(1, inputs[0].numel() // max(1, inputs.shape[1 if inputs.ndim > 2 else -1]))
        size = max(1, CHUNK // max(1, unfolded * positions))
        for number, part in enumerate(inputs.split(size)):
            columns = unfolded_inputs(module, part, self.view)
            self._add(self.sums, columns, columns)
            if dense is not None:
                before = unfolded_inputs(module, dense.split(size)[number], self.view)
                self._add(self.drifts, before - columns, columns)

    def _add(self, sums: list[Tensor], left: Tensor, right: Tensor) -> None:
        for total, one in zip(sums, self.ranges, strict=True):
            total += left[..., one].transpose(1, 2) @ right[..., one]

    def corrected(self, weight: Tensor) -> Tensor | None:
        """Returns the weights by which the layer answers its inputs as it answered those of the dense model.

        They are the regression of the dense outputs on the present inputs, damped towards the dense weights.

        Args:
            weight: float[shape], the dense weights.

        Returns:
            float32[shape]; None where the inputs are those of the dense model.
        """
        if not self.drifts:
            return None
        matrices = self.view.matrices(weight.detach()).float()
        result = matrices.clone()
        for moment, drift, one in zip(self.sums, self.drifts, self.ranges, strict=True):
            diagonal = moment.diagonal(dim1=1, dim2=2)
            mean = diagonal.mean(dim=1, keepdim=True)
            damped = moment.clone()
            damped.diagonal(dim1=1, dim2=2).add_(CORRECTION_DAMPING * mean + torch.finfo(self.dtype).tiny)
            lower, failed = torch.linalg.cholesky_ex(damped)
            if failed.any():
                continue
            outputs = matrices[..., one].to(self.dtype) @ drift
            change = torch.cholesky_solve(outputs.transpose(1, 2), lower).transpose(1, 2)
            result[..., one] += change.masked_fill(is_dead(moment)[:, None], 0).float()
        return self.view.tensor(result) if bool(torch.isfinite(result).all()) else None


def _width(view: LayerView, memory: int) -> tuple[int, torch.dtype]:
    """Returns the columns of a range, 0 where only the diagonal fits, and the dtype of the sums."""
    dtype = torch.float64 if view.columns <= EXACT else torch.float32
    width = min(view.columns, WIDEST, memory // max(1, COPIES * view.groups * view.columns * dtype.itemsize))
    return (width if width >= min(view.columns, NARROWEST) else 0), dtype
