"""Estimates of what a runtime makes of a packed file by a coder of its own, without an export."""

from __future__ import annotations

import os
from typing import Any

from compressor.deployment.layer_sizes import Estimate
from compressor.deployment.registry import make_target
from compressor.formats.file.reader import PackedFile

__all__ = ["estimate"]


def estimate(path: str | os.PathLike[str], to: str, max_memory: int | None = None, **settings: Any) -> Estimate:
    """Returns what the weights of a packed file take by the coder of a runtime; nothing is written.

    Args:
        path: the packed file.
        to: id of a target that estimates, such as ``ethos-u``.
        max_memory: as for ``compressor.load``.
        **settings: of the target.

    Raises:
        UsageError: there is no such target or setting, or it does not estimate.
        MissingError: a package that the target needs is not installed.
        FileError: the packed file is damaged, hostile or of another kind.
    """
    target = make_target(to, settings)
    with PackedFile.open(path, max_memory) as file:
        return target.estimate(file)
