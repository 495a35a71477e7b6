"""What is measured of a model before it is compressed: the calibrator, and the answers to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from compressor.calibration.calibrator import Calibrator
from compressor.calibration.images import Calibration, images_for
from compressor.calibration.reference import Reference
from compressor.formats.errors import UsageError
from compressor.sharing.sites import Site

__all__ = ["Measurement"]


@dataclass(frozen=True)
class Measurement:
    """A calibrator with its images, and what the dense model answers to them.

    Args:
        calibrator: of the model.
        reference: the answers.
        facts: number and source of the images, as files note them.
    """

    calibrator: Calibrator
    reference: Reference
    facts: Mapping[str, Any]

    def diagonal(self, name: str) -> Tensor:
        """Returns the diagonal of the curvature of a tensor by its name, float32[shape]."""
        (site,) = (site for site in self.calibrator.sites if site.name == name)
        return self.calibrator.diagonal(site)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        sites: Sequence[Site],
        calibration: Calibration | str,
        dense: Mapping[str, Tensor],
        seed: int,
        memory: int,
        minor: Sequence[Site] = (),
    ) -> Measurement:
        """Runs a model on the images of a caller, or on some that are made from it.

        Args:
            model: the model.
            sites: the tensors whose curvature will be measured.
            calibration: images, batches of them, or "synthetic".
            dense: the dense weights of the sites by name.
            seed: of all that is drawn.
            memory, minor: as in ``Calibrator``.

        Raises:
            UsageError: ``memory`` is less than 1; or as ``images_for`` and ``Calibrator``.
        """
        if memory < 1:
            raise UsageError(f"memory must be at least 1 byte, got {memory!r}")
        given = images_for(model, calibration, seed)
        calibrator = Calibrator(model, sites, given.images, dense, seed, memory, minor)
        facts = {"images": len(given.images), "source": given.source}
        return cls(calibrator, Reference(model, dense, given.images), facts)
