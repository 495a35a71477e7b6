"""What the weights of a packed file would take where a runtime codes them itself, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Estimate", "LayerEstimate"]


@dataclass(frozen=True)
class LayerEstimate:
    """One weight. Sizes in bytes.

    Args:
        site: name of the tensor.
        shape: of the tensor.
        uncoded: of the weights in the runtime's number format, as a dense model has them before they are coded.
        per_tensor: of the weights by the runtime's own coder, with one scale a tensor, which keeps equal weights equal.
        per_channel: the same with a scale for each output channel, which takes them apart.
    """

    site: str
    shape: tuple[int, ...]
    uncoded: int
    per_tensor: int
    per_channel: int


@dataclass(frozen=True)
class Estimate:
    """All weights of a file that a runtime would code.

    Args:
        target: id of the target.
        layers: one per weight, in the file's order.
        limits: what the figures leave out, in one line.
    """

    target: str
    layers: Sequence[LayerEstimate]
    limits: str

    @property
    def total(self) -> LayerEstimate:
        """All layers together, of no shape."""
        kinds = "uncoded", "per_tensor", "per_channel"
        return LayerEstimate("total", (), *(sum(getattr(layer, kind) for layer in self.layers) for kind in kinds))
