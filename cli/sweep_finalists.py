"""A number that is cheap: how far the answers of untrained files are from those of the dense model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import compressor
from compressor.calibration.reference import Reference
from compressor.cli.configs import Request
from compressor.cli.search import training_images
from compressor.cli.setup import set_up
from compressor.cli.weights import named_model

__all__ = ["divergences"]


def divergences(request: Request, files: Mapping[str, Path]) -> dict[str, float]:
    """Returns the mean divergence of each file's answers to calibration images from those of the dense model, in nats.

    The images are those for training, so that those for validation and test have no part in the choice.

    Args:
        request: of a run that starts from the dense model, with data.
        files: packed, by name.
    """
    run = set_up(request)
    images = training_images(run, run.recipe.stages[-1])
    dense = named_model(run.source, run.execution.seed).to(run.device)
    reference = Reference(dense, {}, images)
    return {name: reference.loss(compressor.load(path).to(run.device)) for name, path in files.items()}
