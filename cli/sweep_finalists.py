"""A number that is cheap: how far the answers of untrained files are from those of the dense model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import compressor
from compressor.calibration.reference import Reference
from compressor.cli.configs import Request
from compressor.cli.search import training_images
from compressor.cli.setup import set_up
from compressor.cli.weights import named_model
from compressor.formats.errors import UsageError
from compressor.formats.io.atomic import write_atomically

__all__ = ["divergences", "noted_divergences"]


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


def noted_divergences(
    path: Path, files: Mapping[str, Path], measure: Callable[[Mapping[str, Path]], dict[str, float]]
) -> dict[str, float]:
    """Returns the divergences of some files, which are measured once, so that all workers make the same choice.

    Args:
        path: where they are noted; the caller holds its lock.
        files: packed, by name.
        measure: called for the files that were not measured before.

    Raises:
        UsageError: the notes cannot be read.
    """
    try:
        noted = {name: float(loss) for name, loss in json.loads(path.read_bytes())["divergences"].items()}
    except FileNotFoundError:
        noted = {}
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise UsageError(
            f"{path}: no divergences of untrained files ({exc!r}); remove it to measure them anew"
        ) from exc
    new = {name: file for name, file in files.items() if name not in noted}
    if new:
        noted |= measure(new)
        document = {"schema_version": 1, "divergences": noted}
        write_atomically(path, (json.dumps(document, indent=2) + "\n").encode(), force=True)
    return {name: noted[name] for name in files}
