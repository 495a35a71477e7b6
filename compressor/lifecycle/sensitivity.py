"""Sensitivity: what the loss of a model gains when one tensor alone is rounded at a price, predicted and measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from compressor.calibration.calibrator import MEMORY
from compressor.calibration.images import Calibration
from compressor.calibration.measurement import Measurement
from compressor.calibration.price import entropy, grid_step
from compressor.formats.errors import UsageError
from compressor.policy.policy import Policy, Rule
from compressor.sharing.curvature import Curvature
from compressor.sharing.group import Group
from compressor.sharing.scheme import Scheme
from compressor.sharing.sites import Site

__all__ = ["RATES", "Sensitivity", "sensitivity"]

RATES = (1e-8, 1e-7, 1e-6)
"""Prices of a bit that span useful files."""


@dataclass(frozen=True)
class Sensitivity:
    """One tensor rounded at one price, with error feedback, while all others are dense.

    Args:
        site: its name.
        shape: of the tensor.
        rate: the price of a bit, in the loss of one image.
        step: of its grid.
        bits: entropy of an index, in bits.
        predicted: loss of one image that the curvature predicts, in nats.
        measured: mean divergence of the answers to the calibration images from the dense ones, in nats.
    """

    site: str
    shape: tuple[int, ...]
    rate: float
    step: float
    bits: float
    predicted: float
    measured: float


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    calibration: Calibration | str = "synthetic",
    rates: Sequence[float] = RATES,
    seed: int = 0,
    memory: int = MEMORY,
) -> Iterator[Sensitivity]:
    """Yields what each tensor loses at each price, by the steps and the curvature that a search for a target uses.

    Args:
        model: the model; its weights are changed meanwhile and restored.
        calibration: images, batches of them, or "synthetic".
        rates: the prices.
        seed: of all that is drawn.
        memory: as in ``Compressor.prepare``.

    Raises:
        UsageError: a price is not above 0; or as ``Compressor.prepare``.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> layer.weight.data = torch.eye(2)
        >>> next(sensitivity(layer, torch.randn(64, 2), rates=[1e-9])).site
        'weight'
    """
    if wrong := [rate for rate in rates if not 0 < rate <= 1]:
        raise UsageError(f"rates: a price of a bit is above 0 and at most 1, got {wrong[0]!r}")
    policy = Policy([Rule("*", scheme="learnt", rate=rates[0])])
    schemes = {plan.site: plan.scheme for plan in policy.plan(model) if plan.scheme}
    sites = list(schemes)
    dense = {site.name: site.tensor.detach().clone() for site in sites}
    measured = Measurement.of(model, sites, calibration, dense, seed, memory)
    for chunk in measured.calibrator.site_chunks():
        curvature = measured.calibrator.measure(chunk, {})
        for site in chunk:
            for rate in rates:
                yield _at(model, site, schemes[site].priced(rate), rate, measured, curvature)


def _at(
    model: nn.Module,
    site: Site,
    scheme: Scheme,
    rate: float,
    measured: Measurement,
    curvature: Mapping[Site, Curvature],
) -> Sensitivity:
    """Rounds one tensor at one price, and restores it."""
    dense = site.tensor.detach().clone()
    group = Group(scheme, [site])
    try:
        scheme.fit(group, curvature)
        weights = group.weight(site, group.master_weight(site)).detach()
        (shared,) = scheme.export(group).tensors.values()
    finally:
        site.tensor.copy_(dense)
    return Sensitivity(
        site.name,
        tuple(dense.shape),
        rate,
        grid_step(rate, curvature[site].mean, dense),
        entropy(torch.from_numpy(shared.indices.astype(np.int64))),
        curvature[site].loss(weights.float() - dense.float()),
        measured.reference.loss(model, {site.name: weights}),
    )
