"""The end of a run: what is not shared is made small, and the model is packed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from compressor.calibration.measurement import Measurement
from compressor.data.batches import Batches
from compressor.lifecycle.convert import halve_untouched, set_state
from compressor.lifecycle.norms import fold_norms
from compressor.lifecycle.packed import Packed, SharedModel
from compressor.lifecycle.target import Search
from compressor.training.batch_norm import estimate_batch_norm

__all__ = ["Finishing"]


@dataclass(frozen=True)
class Finishing:
    """How a model with shared weights becomes a packed one.

    Args:
        calibration: batches that the BatchNorm statistics are estimated on anew; None: they stay.
        in_eval: modules that keep their statistics.
        half: whether the float32 tensors that are not shared become float16.
        fold: whether norms and biases go on grids, with the statistics folded.
        measured: what was measured of the dense model; None: nothing.
        search: how the price was found; None: it was given, or there is none.
        trained: whether the model has been trained with shared weights.
    """

    calibration: Batches | None
    in_eval: Iterable[nn.Module]
    half: bool
    fold: bool
    measured: Measurement | None
    search: Search | None
    trained: bool

    def __call__(self, shared: SharedModel) -> Packed:
        """Changes the model in place, so that it computes what the file will give, and packs it.

        Args:
            shared: a model whose shared weights are set.
        """
        if self.calibration is not None:
            loss = None if self.measured is None else self.measured.reference.loss
            estimate_batch_norm(shared.model, self.calibration, self.in_eval, loss)
        if self.fold:
            norms = fold_norms(shared.model, shared.plans, self._rate(shared), self.measured, trained=self.trained)
            set_state(shared.model, norms.values)
            tensors, books = norms.added_to(shared.tensors, shared.books)
            shared = replace(shared, tensors=tensors, books=books)
        if self.half:
            shared = replace(shared, halved=halve_untouched(shared.model, shared.tensors))
        packed = Packed.of(shared)
        if self.measured is not None:
            packed.note(calibration=self.measured.facts)
        if self.search is not None:
            packed.note(target={"rate": self.search.rate, "predicted": self.search.predicted})
        return packed

    def _rate(self, shared: SharedModel) -> float | None:
        """Returns the least price of a bit that anything is shared at; None where nothing has one."""
        if self.search is not None:
            return self.search.rate
        schemes = [plan.scheme for plan in shared.plans if plan.scheme and plan.scheme.has_price]
        return min((price for scheme in schemes if (price := getattr(scheme, "rate", 0))), default=None)  # 0 is none
